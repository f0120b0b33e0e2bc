"""CPU memory in huge pages of 2 MB, where the system supports them, and buffers cached for reuse.

A decoding step reads every weight once. With pages of 4 kB the processor translates an address
(TLB) every 64 cache lines, which on the machine of docs/kernels.md costs a third of one core's read
bandwidth.

Every training step allocates a few large tensors, for the logits and for gradients as large as the
vocabulary. The system fills fresh pages with zeros when they are first touched (page faults), which
takes as long as the GEMM that writes them. Such buffers are therefore cached for reuse, up to a
bound, until `STEP_BUFFERS.clear()`.
"""

import ctypes
import math
import mmap
import struct
import weakref
from contextlib import suppress

import torch
from torch import Tensor

from easyllm.core.device import memory_total_bytes

SMALL = 1 << 22
"""Minimum size in bytes; below it, huge pages gain nothing."""
ALIGNMENT = 64
"""Bytes of a cache line."""
HUGE = 1 << 21
"""Bytes of a huge page, also on most processors that are not x86."""
FIRST_BYTES = 1 << 18
"""Bytes at the beginning of `growing_empty` in small pages."""
_PAGEMAP_SCAN, _PAGE_IS_HUGE = 0xC0606610, 1 << 6  # linux/fs.h
_MAX_REGIONS = 4096
"""Ranges of huge pages that are counted at most."""


class BufferCache:
    """Caches the buffers of freed tensors for reuse by tensors of similar size.

    Thread-safe: a buffer has one user at a time, and returns to the cache when the last view of its
    tensor is freed, on whichever thread that happens.

    Args:
        max_buffers: maximum number of cached buffers.
        max_bytes: maximum total size of the cached buffers; the oldest are freed first. None means
            an eighth of the machine's memory, determined on first use. Buffers in use are not
            counted.
    """

    def __init__(self, *, max_buffers: int, max_bytes: int | None = None) -> None:
        self.max_buffers = max_buffers
        self._max_bytes = max_bytes
        self._free: list[mmap.mmap] = []

    @property
    def max_bytes(self) -> int:
        """Maximum total size of the cached buffers, in bytes."""
        if self._max_bytes is None:
            self._max_bytes = memory_total_bytes() // 8
        return self._max_bytes

    @property
    def cached_bytes(self) -> int:
        """Total size of the cached buffers, in bytes; buffers in use are not counted."""
        return sum(len(memory) for memory in tuple(self._free))

    def take(self, num_bytes: int) -> mmap.mmap | None:
        """Returns a buffer of at least `num_bytes`.

        It is a cached one of at most twice that size, or else a new one; None if the system does
        not support huge pages.
        """
        for memory in tuple(self._free):
            if num_bytes <= len(memory) <= 2 * num_bytes:
                with suppress(ValueError):  # another thread has taken it
                    self._free.remove(memory)
                    return memory
        self.clear()  # sizes have changed: free buffers that no longer fit
        return _map(num_bytes)

    def release(self, memory: mmap.mmap) -> None:
        """Returns a buffer to the cache for reuse, within the bounds."""
        self._free.append(memory)
        del self._free[: -self.max_buffers]
        while self._free and self.cached_bytes > self.max_bytes:
            with suppress(IndexError):  # another thread has emptied it
                self._free.pop(0)

    def clear(self) -> None:
        """Frees the cached buffers; one in use returns to the cache when its tensor is freed."""
        self._free.clear()


STEP_BUFFERS = BufferCache(max_buffers=4)
"""Default cache of `cached_empty`; a training run clears it when it ends.

See `train.preflight.memory_advice`.
"""


def huge_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns an uninitialized CPU tensor, in huge pages unless it is small."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = _map(num_bytes) if num_bytes >= SMALL else None
    return torch.empty(shape, dtype=dtype) if memory is None else _tensor_on(memory, shape, dtype)


def growing_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns an uninitialized CPU tensor that is used from its beginning, and often not far.

    The first `FIRST_BYTES` are in small pages, so that its first use does not take (and fill with
    zeros) a whole huge page; the rest is in huge pages. Small tensors have no huge pages.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = _map(num_bytes + 2 * HUGE, huge=False) if num_bytes >= SMALL else None
    if memory is None:
        return torch.empty(shape, dtype=dtype)
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    rest = -(-(address + FIRST_BYTES) // HUGE) * HUGE - address  # where a huge page begins
    memory.madvise(mmap.MADV_HUGEPAGE, rest, len(memory) - rest)
    return _tensor_on(memory, shape, dtype, offset=rest - FIRST_BYTES)


def cached_empty(
    shape: tuple[int, ...], dtype: torch.dtype, cache: BufferCache = STEP_BUFFERS
) -> Tensor:
    """Returns an uninitialized CPU tensor in a buffer of `cache`.

    The buffer returns to the cache when the tensor is freed.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = cache.take(num_bytes) if num_bytes >= SMALL else None
    if memory is None:
        return torch.empty(shape, dtype=dtype)
    view = memoryview(memory)  # lives as long as the tensor's storage
    weakref.finalize(view, cache.release, memory).atexit = False
    return _tensor_on(view, shape, dtype)


def _map(num_bytes: int, *, huge: bool = True) -> mmap.mmap | None:
    """Maps new memory in huge pages; returns None if the system does not support them.

    Args:
        num_bytes: size of the memory.
        huge: whether all of it is in huge pages; otherwise, the caller advises the system.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    except OSError:  # the system has no huge pages; callers use ordinary memory
        return None
    return memory


def _tensor_on(
    memory: mmap.mmap | memoryview, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0
) -> Tensor:
    count = math.prod(shape) * dtype.itemsize
    found = torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=offset)
    storage = found.untyped_storage()
    # not a view: autograd accumulates into a gradient in place only if no other tensor shares its
    # memory
    empty = torch.empty(0, dtype=dtype)
    tensor: Tensor = empty.set_(storage, 0, shape)  # type: ignore[call-overload]
    return tensor


def in_huge_pages(tensor: Tensor) -> bool:
    """Returns whether most of the memory of a CPU tensor's storage is mapped in huge pages.

    Memory that was not touched yet is not. Pages of a file are if the file system has large folios
    (XFS, tmpfs, ext4 from Linux 6.16 on) and memory was not fragmented when the file was read. The
    system tells from Linux 6.7 on (the request PAGEMAP_SCAN of /proc/self/pagemap); elsewhere the
    result is False.
    """
    storage = tensor.untyped_storage()
    start = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = -(-(storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE) * mmap.PAGESIZE
    found = (ctypes.c_uint64 * (3 * _MAX_REGIONS))()
    request = struct.pack(
        "12Q",
        *(struct.calcsize("12Q"), 0, start, end, 0),
        *(ctypes.addressof(found), _MAX_REGIONS, 0),
        *(0, _PAGE_IS_HUGE, 0, _PAGE_IS_HUGE),
    )
    try:
        import fcntl  # not on Windows

        with open("/proc/self/pagemap", "rb") as pages:
            count = fcntl.ioctl(pages, _PAGEMAP_SCAN, bytearray(request), True)
    except (ImportError, OSError):
        return False
    huge = sum(found[3 * i + 1] - found[3 * i] for i in range(count))
    return huge > (end - start) / 2


def return_freed_memory() -> None:
    """Makes the C library return freed memory to the system at once, if it can (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def empty_like_each(tensors: list[Tensor]) -> list[Tensor]:
    """Returns uninitialized tensors of the same shapes and dtypes, all in one huge-page buffer."""
    sizes = [t.numel() * t.element_size() for t in tensors]
    strides = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    parts = huge_empty((sum(strides),), torch.uint8).split(strides)
    return [
        part[:size].view(t.dtype).view(t.shape)
        for part, size, t in zip(parts, sizes, tensors, strict=True)
    ]
