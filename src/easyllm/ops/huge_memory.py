"""Memory in pages of 2 MB, where the system has them.

A decoding step reads every weight once. In pages of 4 kB the processor looks up an address every 64 cache lines, which
on the machine of docs/kernels.md costs a third of the rate at which one core can read.

A training step needs a few large tensors every time, for the logits and for gradients as large as the vocabulary. Fresh pages are
filled with zeros by the system when they are first touched, which takes as long as the product that fills them; so what
such a tensor leaves is kept for the next.
"""

import ctypes
import math
import mmap
import weakref
from contextlib import suppress

import torch
from torch import Tensor

SMALL = 1 << 22
"""Bytes below which large pages gain nothing."""
ALIGNMENT = 64


MOST_LEFT = 4
"""Pieces that are kept for the next tensors."""
_left: list[mmap.mmap] = []


def huge_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU whose values are not set, in large pages if it is not small."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = _map(num_bytes) if num_bytes >= SMALL else None
    return torch.empty(shape, dtype=dtype) if memory is None else _tensor_on(memory, shape, dtype)


def kept_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The same, in memory that an earlier tensor of this function has left, if some fits, and that is kept when
    nobody has the tensor any more."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = _take(num_bytes) if num_bytes >= SMALL else None
    if memory is None:
        return torch.empty(shape, dtype=dtype)
    view = memoryview(memory)  # which lives as long as the tensor's storage
    weakref.finalize(view, _leave, memory).atexit = False
    return _tensor_on(view, shape, dtype)


def _take(num_bytes: int) -> mmap.mmap | None:
    for memory in list(_left):
        if num_bytes <= len(memory) <= 2 * num_bytes:
            with suppress(ValueError):  # another thread has taken it
                _left.remove(memory)
                return memory
    _left.clear()  # sizes have changed: nothing is kept that is of no use
    return _map(num_bytes)


def _leave(memory: mmap.mmap) -> None:
    _left.append(memory)
    del _left[:-MOST_LEFT]


def _map(num_bytes: int) -> mmap.mmap | None:
    """Fresh memory in large pages; None where the system has none."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them: ordinary pages do as well
        return None
    return memory


def _tensor_on(
    memory: mmap.mmap | memoryview, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    # not a view of it: autograd adds to a gradient in place only where no other tensor has its memory
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload]


def return_freed_memory() -> None:
    """Has the C library give freed memory back to the system at once, where it can be asked to (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def rooms_for(tensors: list[Tensor]) -> list[Tensor]:
    """A place for each tensor, of its shape and dtype, one behind the other in large pages; their values are not set."""
    sizes = [t.numel() * t.element_size() for t in tensors]
    strides = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    parts = huge_empty((sum(strides),), torch.uint8).split(strides)
    return [
        part[:size].view(t.dtype).view(t.shape)
        for part, size, t in zip(parts, sizes, tensors, strict=True)
    ]
