"""Memory in large pages: shapes, dtypes, places that do not overlap, machines without it."""

import mmap

import pytest
import torch

from easyllm.ops.huge_memory import ALIGNMENT, SMALL, huge_empty, rooms_for


@pytest.mark.parametrize("rows", [3, SMALL // 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_tensor_like_any_other(rows, dtype):
    x = huge_empty((rows, 64), dtype)
    assert x.shape == (rows, 64)
    assert x.dtype == dtype
    assert x.is_contiguous()
    x.fill_(1)
    assert x[-1].float().sum() == 64
    assert x.clone().numel() == x.numel()


def test_rooms_do_not_overlap():
    tensors = [torch.arange(n, dtype=dtype) for n, dtype in [(5, torch.float32), (70, torch.uint8)]]
    tensors.append(torch.randn(700, 2000))
    rooms = rooms_for(tensors)
    for room, tensor in zip(rooms, tensors, strict=True):
        assert (room.shape, room.dtype) == (tensor.shape, tensor.dtype)
        assert room.data_ptr() % ALIGNMENT == 0
        room.copy_(tensor)
    assert all(torch.equal(a, b) for a, b in zip(rooms, tensors, strict=True))


def test_systems_without_large_pages(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert huge_empty((SMALL,), torch.uint8).numel() == SMALL
