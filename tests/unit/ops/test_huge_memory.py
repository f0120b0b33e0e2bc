"""Memory in huge pages: shapes, dtypes, disjoint buffers, caching, unsupported systems."""

import contextlib
import mmap
import threading
from pathlib import Path

import pytest
import torch

from easyllm.ops import huge_memory
from easyllm.ops.huge_memory import (
    ALIGNMENT,
    SMALL,
    STEP_BUFFERS,
    BufferCache,
    cached_empty,
    empty_like_each,
    growing_empty,
    huge_empty,
)
from easyllm.train import TrainConfig
from easyllm.train.preflight import memory_advice


@pytest.fixture
def left():
    """The cached buffers, initially none."""
    STEP_BUFFERS.clear()
    yield STEP_BUFFERS._free
    STEP_BUFFERS.clear()


@pytest.mark.parametrize("make", [huge_empty, cached_empty, growing_empty])
@pytest.mark.parametrize("rows", [3, SMALL // 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_an_allocated_tensor_behaves_like_any_other(left, make, rows, dtype):
    x = make((rows, 64), dtype)
    assert x.shape == (rows, 64)
    assert x.dtype == dtype
    assert x.is_contiguous()
    x.fill_(1)
    assert x[-1].float().sum() == 64
    assert x.clone().numel() == x.numel()


def test_buffers_do_not_overlap():
    tensors = [torch.arange(n, dtype=dtype) for n, dtype in [(5, torch.float32), (70, torch.uint8)]]
    tensors.append(torch.randn(700, 2000))
    rooms = empty_like_each(tensors)
    for room, tensor in zip(rooms, tensors, strict=True):
        assert (room.shape, room.dtype) == (tensor.shape, tensor.dtype)
        assert room.data_ptr() % ALIGNMENT == 0
        room.copy_(tensor)
    assert all(torch.equal(a, b) for a, b in zip(rooms, tensors, strict=True))


def test_a_buffer_is_reused_once_all_its_views_are_released(left):
    first = cached_empty((SMALL,), torch.uint8)
    place, row = first.data_ptr(), first.view(torch.float32)[7:]
    del first
    other = cached_empty((SMALL,), torch.uint8)  # while a view is alive
    row.fill_(1.0)
    other.fill_(0)
    assert (row == 1).all()
    assert not left
    del row
    assert len(left) == 1
    again = cached_empty((SMALL // 128, 64), torch.bfloat16)
    assert again.data_ptr() == place
    assert cached_empty((SMALL,), torch.uint8).data_ptr() not in (place, other.data_ptr())


def test_tensors_saved_for_the_backward_pass_are_not_reused(left):
    class SavedTensor(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, value):
            saved = cached_empty((SMALL,), torch.float32).fill_(value)
            ctx.save_for_backward(saved)
            return x * value

        @staticmethod
        def backward(ctx, grad):
            return ctx.saved_tensors[0].mean() * grad, None

    x = torch.ones((), requires_grad=True)
    outs = [SavedTensor.apply(x, value) for value in (2.0, 3.0, 4.0)]
    for out, value in zip(outs, (2.0, 3.0, 4.0), strict=True):
        assert torch.autograd.grad(out, x)[0] == value


def test_useless_buffers_are_not_cached(left):
    for size in (1, 3, 7, 15):
        cached_empty((SMALL * size,), torch.uint8)
        assert [len(piece) for piece in left] == [SMALL * size]
    tensors = [cached_empty((SMALL,), torch.uint8) for _ in range(STEP_BUFFERS.max_buffers + 3)]
    del tensors
    assert len(left) == STEP_BUFFERS.max_buffers


def test_a_cache_stores_at_most_its_maximum_of_bytes():
    cache = BufferCache(max_buffers=9, max_bytes=3 * SMALL)
    tensors = [cached_empty((SMALL,), torch.uint8, cache) for _ in range(5)]
    places = [tensor.data_ptr() for tensor in tensors]
    assert cache.cached_bytes == 0  # buffers in use are not counted
    while tensors:
        del tensors[0]
        assert cache.cached_bytes <= 3 * SMALL
    assert cache.cached_bytes == 3 * SMALL
    again = [cached_empty((SMALL,), torch.uint8, cache) for _ in range(3)]
    assert {tensor.data_ptr() for tensor in again} == set(places[2:])  # the oldest were freed
    larger = cached_empty((4 * SMALL,), torch.uint8, cache)
    del larger
    assert cache.cached_bytes == 0


def test_the_limit_is_a_share_of_the_machines_memory(monkeypatch):
    monkeypatch.setattr("easyllm.ops.huge_memory.memory_total_bytes", lambda: 16 * SMALL)
    cache = BufferCache(max_buffers=9)
    tensors = [cached_empty((SMALL,), torch.uint8, cache) for _ in range(5)]
    del tensors
    assert cache.cached_bytes == cache.max_bytes == 2 * SMALL


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_frees_the_buffers_cached_by_its_steps(left, fails):
    def run():
        with memory_advice(TrainConfig(data={"train": ["a"]})):
            cached_empty((SMALL,), torch.uint8)
            assert left
            if fails:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        run()
    assert not left


def test_threads_do_not_share_memory(left):
    wrong = []

    def work(value):
        for _ in range(300):
            x = cached_empty((SMALL,), torch.uint8)
            x[::4096] = value
            if not (x[::4096] == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("make", [huge_empty, cached_empty])
def test_systems_without_huge_pages_are_supported(left, monkeypatch, make):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert make((SMALL,), torch.uint8).numel() == SMALL


def test_memory_is_in_huge_pages_once_it_is_used():
    tensor = huge_empty((1 << 24,), torch.uint8)
    assert not huge_memory.in_huge_pages(tensor)
    tensor.fill_(1)
    if not huge_memory.in_huge_pages(tensor):
        pytest.skip("a system without huge pages, or before Linux 6.7")
    assert huge_memory.in_huge_pages(tensor[1000:-1000])
    untouched = huge_empty((1 << 26,), torch.uint8)
    untouched[: 1 << 24] = 1
    assert not huge_memory.in_huge_pages(untouched)


def test_without_the_request_memory_counts_as_small_pages(monkeypatch):
    monkeypatch.setattr(huge_memory, "_PAGEMAP_SCAN", 0)
    assert not huge_memory.in_huge_pages(huge_empty((1 << 24,), torch.uint8).fill_(1))


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is read from /proc")
def test_the_first_use_of_growing_memory_takes_little_of_it():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    tensors = [growing_empty((1 << 24,), torch.uint8) for _ in range(8)]
    before = resident()
    for tensor in tensors:
        tensor[:10_000] = 1
    assert resident() - before < 8 * 100_000
    for tensor in tensors:
        tensor.fill_(2)
    assert resident() - before > 8 * 0.9 * (1 << 24)
    assert all(tensor.unique().tolist() == [2] for tensor in tensors)
    assert len({tensor.data_ptr() for tensor in tensors}) == 8
