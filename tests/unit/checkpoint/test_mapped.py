"""Mapped files: other readers read them, damage is found, and changes stay in the process."""

import stat

import pytest
import torch
from safetensors.torch import load_file

from easyllm.checkpoint.mapped import map_tensors, write_mapped

TENSORS = {
    "codes": torch.arange(10_000, dtype=torch.int16).to(torch.uint8).view(50, 200),
    "scales": torch.randn(50, 7),
    "offset": torch.tensor(3.0),
    "half": torch.randn(3, 3).bfloat16(),
    "like": torch.empty(0, dtype=torch.bfloat16),
    "turned": torch.randn(4, 5).T,
}


@pytest.fixture
def path(tmp_path):
    write_mapped(tmp_path / "x.safetensors", TENSORS)
    return tmp_path / "x.safetensors"


def assert_equal(found):
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert all(found[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_the_tensors_are_those_that_were_written(path):
    assert_equal(map_tensors(path))


def test_safetensors_reads_the_file(path):
    assert_equal(load_file(path))


def test_tensors_start_at_a_page(path):
    data = path.read_bytes()
    assert (8 + int.from_bytes(data[:8], "little")) % 4096 == 0


def test_all_tensors_share_one_storage(path):
    tensors = map_tensors(path).values()
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def test_a_change_reaches_neither_the_file_nor_another_mapping(path):
    before, first = path.read_bytes(), map_tensors(path)
    first["codes"].fill_(7)
    assert_equal(map_tensors(path))
    assert path.read_bytes() == before


def test_memory_stays_valid_after_the_file_is_removed(path):
    found = map_tensors(path)
    path.unlink()
    assert_equal(found)


def test_writing_keeps_the_permissions_of_the_file(tmp_path):
    path = tmp_path / "x"
    path.touch(mode=0o600)
    write_mapped(path, TENSORS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("place", range(0, 24_000, 611))
def test_a_changed_byte_anywhere_is_found(path, place):
    data = bytearray(path.read_bytes())
    place %= len(data)
    data[place] ^= 64
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"digest|truncated|JSON|codec|line 1"):
        map_tensors(path)


def test_exchanged_blocks_are_found(path):
    data = path.read_bytes()
    path.write_bytes(data[:4096] + data[8192:12288] + data[4096:8192] + data[12288:])
    with pytest.raises(ValueError, match="digest"):
        map_tensors(path)


@pytest.mark.parametrize("size", [0, 1, 8, 100, 4096, 4097, 9000, -4096, -1])
def test_a_truncated_file_is_found(path, size):
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError):
        map_tensors(path)


@pytest.mark.parametrize(
    "header",
    [b"[]", b"5", b"{}", b'{"__metadata__": 1}', b'{"__metadata__": {"digest": 1}}', b"[" * 5000],
)
def test_a_header_of_another_form_is_refused(tmp_path, header):
    header += b" " * (-(8 + len(header)) % 4096)
    path = tmp_path / "x"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(ValueError, match=r"digest|JSON|line 1"):
        map_tensors(path)


def test_a_missing_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        map_tensors(tmp_path / "none")
