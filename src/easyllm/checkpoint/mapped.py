"""Safetensors files that are mapped into memory and whose contents are checked.

A mapped file is read by the operating system, page by page, into memory that all processes with the
same file share. The mapping is private: a tensor that is changed in place changes neither the file
nor other processes.

The header of a file contains a digest of its tensors, so that a damaged file is found before its
weights are used. It is the SHA-256 of the sums of all blocks of 4 kB: as fast as reading the memory
once, which the first forward pass does anyway, and any single damaged, missing or misplaced block
changes it. It does not protect against someone who forges a file on purpose.
"""

import hashlib
import json
import mmap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from easyllm.checkpoint.stream import DTYPES, stream_tensors

BLOCK_BYTES = 4096
"""Bytes that are summed; the tensors start at a multiple of it, as pages do."""
DIGEST = "digest"
_EMPTY_DIGEST = "0" * 64
_OF_NAMES = {name: dtype for dtype, name in DTYPES.items()}


def write_mapped(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors with their digest, but not atomically: see `atomic_file`.

    Args:
        path: the file; if it exists, it keeps its permissions.
        tensors: the tensors by name, in the order in which they are stored.

    Raises:
        OutputError: the operating system does not allow writing there.
    """
    stream_tensors(
        path,
        tensors,
        lambda _: None,
        metadata={DIGEST: _EMPTY_DIGEST},
        alignment=BLOCK_BYTES,
    )
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        header, data = _parts(memory)
        digest = _digest(header, data)
        del data  # the mapping cannot be closed while a tensor uses it
        at = memory.find(_EMPTY_DIGEST.encode())
        memory[at : at + len(digest)] = digest.encode()


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Maps a file that `write_mapped` wrote, and returns its tensors by name.

    The tensors share one storage, the mapping.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is damaged or truncated.
    """
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    with suppress(OSError, AttributeError):  # read in huge pages, if the file system has them
        memory.madvise(mmap.MADV_HUGEPAGE)
    header, data = _parts(memory)
    try:
        records = json.loads(header)
        digest = records.pop("__metadata__")[DIGEST].encode()
    except (LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError("it has no digest") from None
    if _digest(header.replace(digest, _EMPTY_DIGEST.encode(), 1), data).encode() != digest:
        raise ValueError("its contents do not match its digest")
    tensors = {}
    for name, record in records.items():
        start, end = record["data_offsets"]
        tensors[name] = data[start:end].view(_OF_NAMES[record["dtype"]]).view(record["shape"])
    return tensors


def _parts(memory: mmap.mmap) -> tuple[bytes, Tensor]:
    """Returns the header of a mapped file, and the bytes of its tensors.

    Raises:
        ValueError: the file ends before the tensors.
    """
    start = 8 + int.from_bytes(memory[:8], "little")
    if start % BLOCK_BYTES or start >= len(memory):
        raise ValueError("it is truncated")
    return memory[8:start], torch.frombuffer(memory, dtype=torch.uint8, offset=start)


def _digest(header: bytes, data: Tensor) -> str:
    """Returns the digest of a header, with an empty digest in it, and the bytes of its tensors."""
    whole = len(data) // BLOCK_BYTES * BLOCK_BYTES
    sums = data[:whole].view(torch.int64).view(-1, BLOCK_BYTES // 8).sum(1)
    found = hashlib.sha256(header)
    for part in (sums.view(torch.uint8), data[whole:]):
        found.update(part.numpy().data)
    return found.hexdigest()


__all__ = ["map_tensors", "write_mapped"]
