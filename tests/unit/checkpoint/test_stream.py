"""Streamed safetensors files: other readers read them, and damage is found."""

import pytest
import torch
from safetensors.torch import load_file

from easyllm.checkpoint import stream
from easyllm.checkpoint.stream import TensorFile, Under, stream_tensors
from easyllm.core.errors import CheckpointError

TENSORS = {
    "a.bytes": torch.arange(7, dtype=torch.uint8),
    "a.wide": torch.randn(5, 6, dtype=torch.float64),
    "b.half": torch.randn(3, 3).bfloat16(),
    "b.step": torch.tensor(3.0),
    "b.none": torch.empty(0, 4),
    "ключ": torch.randn(4, 5).T,
}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "PIECE_BYTES", 64)
    stream_tensors(tmp_path / "x.safetensors", TENSORS, lambda _: None)
    return tmp_path / "x.safetensors"


def assert_equal(found):
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert all(found[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_safetensors_reads_what_was_streamed(path):
    assert_equal(load_file(path))


def test_a_file_is_read_through_several_mappings(path, monkeypatch):
    monkeypatch.setattr(stream, "MAPPED_BYTES", 10)
    assert_equal(TensorFile(path))


def test_every_element_is_released_after_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "PIECE_BYTES", 64)
    released = []
    stream_tensors(tmp_path / "x.safetensors", TENSORS, lambda piece: released.append(len(piece)))
    assert sum(released) == sum(tensor.numel() for tensor in TENSORS.values())
    assert max(released) <= 64


def test_names_under_a_prefix(path):
    found = Under(TensorFile(path), "b.")
    assert sorted(found) == ["half", "none", "step"]
    assert len(found) == 3
    assert found["step"] == 3
    assert found.get("wide") is None


def test_a_truncated_file_is_refused(path):
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        TensorFile(path)
