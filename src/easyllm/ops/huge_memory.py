"""Memory in pages of 2 MB, where the system has them.

A decoding step reads every weight once. In pages of 4 kB the processor looks up an address every 64 cache lines, which
on the machine of docs/kernels.md costs a third of the rate at which one core can read.
"""

import ctypes
import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

SMALL = 1 << 22
"""Bytes below which large pages gain nothing."""
ALIGNMENT = 64


def huge_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU whose values are not set, in large pages if it is not small."""
    mapped = _mapped(shape, dtype)
    return torch.empty(shape, dtype=dtype) if mapped is None else mapped


def huge_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The same with zeros; pages of a large one that nothing is written to take no memory and no time."""
    mapped = _mapped(shape, dtype)
    return torch.zeros(shape, dtype=dtype) if mapped is None else mapped


def _mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Zeros in large pages; None where they would be small, or the system has no such pages."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < SMALL or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them: ordinary pages do as well
        return None
    storage = torch.frombuffer(memory, dtype=dtype).untyped_storage()
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
