"""Memory in pages of 2 MB, where the system has them.

A decoding step reads every weight once. In pages of 4 kB the processor looks up an address every 64 cache lines, which
on the machine of docs/kernels.md costs a third of the rate at which one core can read.

A training step needs a few large tensors every time, for the logits and for gradients as large as the vocabulary. Fresh pages are
filled with zeros by the system when they are first touched, which takes as long as the product that fills them; so the
memory of such a tensor is cached for the next one, up to a bound, until `STEP_BUFFERS.clear()`.
"""

import ctypes
import math
import mmap
import weakref
from contextlib import suppress

import torch
from torch import Tensor

from easyllm.core.device import memory_total_bytes

SMALL = 1 << 22
"""Bytes below which large pages gain nothing."""
ALIGNMENT = 64


class BufferCache:
    """Memory of tensors that nobody has any more, for the next ones of their size.

    Safe for threads: a buffer is given to one taker; it comes back when the last view of its tensor is gone, whichever
    thread that happens in.

    Args:
        max_buffers: cached at once.
        max_bytes: of all that are cached together; the oldest are freed first. None is an eighth of the machine's
            memory, read when first needed. What is in use is not counted.
    """

    def __init__(self, *, max_buffers: int, max_bytes: int | None = None) -> None:
        self.max_buffers = max_buffers
        self._max_bytes = max_bytes
        self._free: list[mmap.mmap] = []

    @property
    def max_bytes(self) -> int:
        if self._max_bytes is None:
            self._max_bytes = memory_total_bytes() // 8
        return self._max_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that are cached and in no use."""
        return sum(len(memory) for memory in tuple(self._free))

    def take(self, num_bytes: int) -> mmap.mmap | None:
        """A buffer of at least `num_bytes` and at most twice as many, else a fresh one; None where there are no large
        pages."""
        for memory in tuple(self._free):
            if num_bytes <= len(memory) <= 2 * num_bytes:
                with suppress(ValueError):  # another thread has taken it
                    self._free.remove(memory)
                    return memory
        self.clear()  # sizes have changed: nothing is cached that is of no use
        return _map(num_bytes)

    def give_back(self, memory: mmap.mmap) -> None:
        """Caches a buffer for the next taker, within the bounds."""
        self._free.append(memory)
        del self._free[: -self.max_buffers]
        while self._free and self.held_bytes > self.max_bytes:
            with suppress(IndexError):  # another thread has emptied it
                self._free.pop(0)

    def clear(self) -> None:
        """Frees what is cached; buffers in use are freed or cached when their tensors go."""
        self._free.clear()


STEP_BUFFERS = BufferCache(max_buffers=4)
"""What `cached_empty` takes from; a training run clears it at its end (`train.preflight.memory_advice`)."""


def huge_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU whose values are not set, in large pages if it is not small."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = _map(num_bytes) if num_bytes >= SMALL else None
    return torch.empty(shape, dtype=dtype) if memory is None else _tensor_on(memory, shape, dtype)


def cached_empty(
    shape: tuple[int, ...], dtype: torch.dtype, cache: BufferCache = STEP_BUFFERS
) -> Tensor:
    """The same, in memory from `cache`, which gets it back when nobody has the tensor any more."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = cache.take(num_bytes) if num_bytes >= SMALL else None
    if memory is None:
        return torch.empty(shape, dtype=dtype)
    view = memoryview(memory)  # which lives as long as the tensor's storage
    weakref.finalize(view, cache.give_back, memory).atexit = False
    return _tensor_on(view, shape, dtype)


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
    """An empty tensor for each, of its shape and dtype, one after the other in large pages; values are not set."""
    sizes = [t.numel() * t.element_size() for t in tensors]
    strides = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    parts = huge_empty((sum(strides),), torch.uint8).split(strides)
    return [
        part[:size].view(t.dtype).view(t.shape)
        for part, size, t in zip(parts, sizes, tensors, strict=True)
    ]
