"""Tensors in a file that has no name, whose pages the system can move between memory and disk.

The file is mapped into memory as shared, so its content outlives the pages. `release` takes a
tensor's pages out of the process; they stay in the system's page cache as long as there is free
memory, are written to the disk when there is none, and return when they are next used.
"""

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from easyllm.core.atomic import output_errors
from easyllm.core.errors import ConfigError

IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
"""File systems without a disk, whose files stay in memory."""


class PagedMemory:
    """A file of fixed size, mapped into memory, that holds tensors.

    The disk space is reserved first, so that a full disk is an error here and not later, when the
    system would end the process. It is freed with the last tensor, also if the process is killed.

    Args:
        folder: an existing folder; the file has no name in it.
        num_bytes: size of all tensors, each rounded up by `padded`.

    Raises:
        ConfigError: the system has no such files, or the folder's file system is in memory.
        OutputError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, folder: Path, num_bytes: int) -> None:
        check_paging(folder)
        with output_errors(folder / "optimizer state"), tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            self._map = mmap.mmap(file.fileno(), num_bytes)
        self._start = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
        self._used = 0

    def zeros_like(self, like: Tensor) -> Tensor:
        """Returns a tensor of zeros of the shape and dtype of `like`, in the file."""
        offset = self._used
        self._used += padded(like.nbytes)
        # each tensor has a storage of its own: safetensors refuses tensors that share one
        flat = torch.frombuffer(self._map, dtype=like.dtype, count=like.numel(), offset=offset)
        return flat.view(like.shape)

    def release(self, tensor: Tensor) -> None:
        """Takes the pages of a contiguous tensor out of the process, if they are in the file."""
        first = tensor.data_ptr() - self._start
        if not 0 <= first < len(self._map):
            return
        aligned = first // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, aligned, first + tensor.nbytes - aligned)


def padded(num_bytes: int) -> int:
    """Returns a size rounded up to complete pages."""
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def existing_folder(path: Path) -> Path:
    """Returns a folder, or the nearest of its parents that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def check_paging(folder: Path) -> None:
    """Checks that memory can be paged to a file in an existing folder.

    Raises:
        ConfigError: it cannot.
    """
    if not hasattr(os, "posix_fallocate") or not hasattr(mmap, "MADV_DONTNEED"):
        raise ConfigError(
            "optimizer.paged=true needs files that can be mapped and released, as on Linux; set "
            "optimizer.state=int8 to save memory on this system"
        )
    if _file_system(folder) in IN_MEMORY:
        raise ConfigError(
            f"optimizer.paged=true needs a disk, but the folder {str(folder)!r} is in memory "
            f"({_file_system(folder)}); set output to a folder on a disk"
        )


def _file_system(folder: Path) -> str:
    """Returns the type of the file system of a folder; an empty string if it is not known."""
    found, longest = "", -1
    try:
        lines = Path("/proc/mounts").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return found
    place = folder.resolve()
    for line in lines:
        _, target, kind, *_ = line.split(" ")
        mounted = Path(target.encode().decode("unicode_escape"))
        if place.is_relative_to(mounted) and len(mounted.parts) >= longest:
            found, longest = kind, len(mounted.parts)
    return found


__all__ = ["PagedMemory", "check_paging", "existing_folder", "padded"]
