"""A paged optimizer: the bits of the plain one, and memory that does not grow with its state."""

import json
import subprocess
import sys

import pytest
import torch

from easyllm.checkpoint.stream import TensorFile, stream_tensors
from easyllm.core.errors import ConfigError, OutputError
from easyllm.ops.kernels import build
from easyllm.train import paged_adamw, paged_memory
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig, MuonConfig
from easyllm.train.paged_memory import PagedMemory, check_paging, existing_folder
from optimizer_parameters import (
    ADAMW,
    assert_same_bits,
    backward,
    make_gradients,
    make_parameters,
)

pytestmark = pytest.mark.usefixtures("two_threads")  # kernels split their work

PAGED = ADAMW.model_copy(update={"paged": True})
CONFIGS = {
    "adamw": (ADAMW, PAGED),
    "muon": (MuonConfig(others=ADAMW), MuonConfig(others=PAGED)),
}


@pytest.fixture
def small_chunks(monkeypatch):
    """A tensor has several chunks, whose bounds are not those of pages.

    They are multiples of a cache line: PyTorch rounds the elements after the last one differently.
    """
    monkeypatch.setattr(paged_adamw, "CHUNK", 704)


def take_steps(optimizer, parameters, steps):
    for step in steps:
        backward(parameters, make_gradients(parameters, seed=step))
        optimizer.clip(optimizer.grad_norm(), 1.0)
        optimizer.step(0.5 + step / 8)


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_and_moments_are_bitwise_those_of_the_plain_optimizer(
    small_chunks, monkeypatch, tmp_path, name, dtype, has_kernels
):
    if not has_kernels:
        monkeypatch.setattr(build, "_library", lambda: None)
    results = []
    for config in CONFIGS[name]:
        parameters = make_parameters(dtype)
        optimizer = MasterOptimizer(parameters, config, folder=tmp_path)
        take_steps(optimizer, parameters, range(4))
        results.append((optimizer.tensors(), dict(parameters)))
    assert (results[1][0].keys()) == results[0][0].keys()
    assert_same_bits(results[1][0], results[0][0])
    assert_same_bits(results[1][1], results[0][1])
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_a_resumed_run_continues_with_the_same_bits(small_chunks, tmp_path):
    whole, first, second = (make_parameters() for _ in range(3))
    undisturbed = MasterOptimizer(whole, ADAMW)
    take_steps(undisturbed, whole, range(4))
    saved = MasterOptimizer(first, PAGED)
    take_steps(saved, first, range(2))
    stream_tensors(tmp_path / "state.safetensors", saved.tensors(), saved.release)
    resumed = MasterOptimizer(second, PAGED)
    resumed.load_tensors(TensorFile(tmp_path / "state.safetensors"))
    take_steps(resumed, second, (2, 3))
    assert_same_bits(resumed.tensors(), undisturbed.tensors())


MEASURE = """
import json, resource, sys, torch
from pathlib import Path
from torch import nn
from easyllm.checkpoint.stream import TensorFile, stream_tensors
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig
from easyllm.core.device import peak_rss_bytes

paged, folder = sys.argv[1] == "paged", Path(sys.argv[2])
torch.set_num_threads(1)
weights = {f"layers.{n}.up_proj.weight": nn.Parameter(torch.zeros(2500, 1000)) for n in range(8)}
before = peak_rss_bytes()
optimizer = MasterOptimizer(weights, AdamWConfig(paged=paged), folder=folder)
for _ in range(2):
    for weight in weights.values():
        weight.grad = torch.full_like(weight, 0.5)
    optimizer.step(1.0)
stepped = peak_rss_bytes()
stream_tensors(folder / "state.safetensors", optimizer.tensors(), optimizer.release)
saved = peak_rss_bytes()
optimizer.load_tensors(TensorFile(folder / "state.safetensors"))
print(json.dumps([stepped - before, saved - stepped, peak_rss_bytes() - saved]))
"""


def measure(kind, folder):
    """Returns the growth of a process's peak memory in two steps, saving and loading, in bytes."""
    command = [sys.executable, "-c", MEASURE, kind, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
def test_the_state_is_not_in_memory(tmp_path):
    """20 million weights: their moments take 160 MB, the gradients 80 MB in both processes."""
    state = 20_000_000 * 8
    plain, paged = (measure(kind, tmp_path)[0] for kind in ("plain", "paged"))
    assert plain > state
    assert plain - paged > 0.8 * state


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
def test_saving_and_loading_do_not_bring_the_state_back_into_memory(tmp_path):
    _, saving, loading = measure("paged", tmp_path)
    assert saving < 40e6
    assert loading < 100e6  # a mapping of the file is renewed every 64 MiB


def test_a_full_disk_is_one_sentence(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paged_memory.os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="no space is left on the disk"):
        MasterOptimizer(make_parameters(), PAGED, folder=tmp_path)


def test_a_folder_in_memory_is_refused(monkeypatch, tmp_path):
    check_paging(tmp_path)
    monkeypatch.setattr(paged_memory, "_file_system", lambda _: "tmpfs")
    with pytest.raises(ConfigError, match="needs a disk"):
        MasterOptimizer(make_parameters(), PAGED, folder=tmp_path)


def test_the_file_system_is_that_of_the_innermost_mount(monkeypatch):
    mounts = "/dev/a / ext4 rw 0 0\nnone /a\\040b tmpfs rw 0 0\n/dev/c /a\\040b/c xfs rw 0 0\n"
    monkeypatch.setattr(paged_memory.Path, "read_text", lambda *_, **__: mounts)
    places = {"/x": "ext4", "/a b/y": "tmpfs", "/a b/c": "xfs", "/a b/cd": "tmpfs"}
    assert {p: paged_memory._file_system(paged_memory.Path(p)) for p in places} == places


def test_released_tensors_keep_their_values(tmp_path):
    like = torch.empty(3, 1000)
    memory = PagedMemory(tmp_path, 3 * paged_memory.padded(like.nbytes))
    tensors = [memory.zeros_like(like) for _ in range(3)]
    assert all(torch.equal(tensor, torch.zeros_like(like)) for tensor in tensors)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for tensor in [*tensors, torch.ones(5)]:  # a tensor elsewhere is left alone
        memory.release(tensor)
    del memory
    assert [tensor.unique().tolist() for tensor in tensors] == [[0.0], [1.0], [2.0]]


def test_the_folder_of_a_run_that_does_not_exist_yet_is_the_nearest_parent(tmp_path):
    assert existing_folder(tmp_path / "runs" / "mine") == tmp_path


def test_moments_of_one_byte_are_not_paged():
    with pytest.raises(ValueError, match="remove one of the two"):
        AdamWConfig(paged=True, state="int8")
