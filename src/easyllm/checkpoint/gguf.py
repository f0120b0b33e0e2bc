"""GGUF files: a parser for the header, and tensors that are dequantized on demand.

Layout (GGUF specification, version 3, little-endian): magic "GGUF", version u32, number of tensors
u64, number of key-value pairs u64; the pairs (string key, u32 type, value); one record per tensor
(name, u32 number of dims, u64 sizes, fastest dim first, u32 type, u64 offset); padding to the
alignment; the data.

Every length is checked against the file size before it is used: a damaged file gives a
one-sentence error.
"""

import contextlib
import mmap
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from easyllm.checkpoint.file_state import FileState
from easyllm.checkpoint.gguf_types import GGUF_TYPES
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import Json, JsonObject

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ARRAY_DEPTH = 4
MAX_DIMS = 4
MADV_PAGEOUT = 21
"""Linux's MADV_PAGEOUT, for which Python's `mmap` has no constant."""
MIN_SHARED_BYTES = 1 << 20
"""Minimum size in bytes of a tensor that shares the memory-mapped pages of the file (if it already
has the requested dtype). Smaller tensors are copied: accessing one of their pages would bring many
neighbouring pages back into memory."""

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """The location of a tensor in a file.

    Attributes:
        shape: in row-major order (slowest dim first).
        type_name: the GGML type, such as `Q4_0`.
        offset: bytes from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    num_bytes: int

    def part(self, index: int) -> "GGUFTensor":
        """Returns slice `index` of the slowest dimension (no quantization block spans two rows)."""
        size = self.num_bytes // self.shape[0]
        return replace(
            self, shape=self.shape[1:], offset=self.offset + index * size, num_bytes=size
        )


class GGUFFile:
    """An open GGUF file.

    Attributes:
        metadata: the key-value pairs, with arrays as lists.
        tensors: the location of each tensor, by name.
        files: the file itself, as it was before it was opened.

    Raises:
        CheckpointError: the file is missing, damaged or not a GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self.files = [FileState.of(self.path)]
            with self.path.open("rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    raise CheckpointError(
                        f"GGUF file {str(path)!r} is empty; download or convert it again"
                    )
                # copy-on-write, so that tensors can share the mapped pages
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise CheckpointError(f"GGUF file {str(path)!r} does not exist") from None
        except OSError as error:
            raise CheckpointError(f"cannot read GGUF file {str(path)!r}: {error}") from None
        header = _HeaderReader(self._map, self.path)
        self.metadata, self.tensors = header.read()

    def raw(self, name: str, *, part: int | None = None) -> Tensor:
        """Returns a copy of the bytes of a tensor, or of slice `part` of its slowest dimension.

        Returns:
            [..., bytes of a row] uint8.
        """
        location = self.tensors[name]
        location = location if part is None else location.part(part)
        raw = np.frombuffer(self._map, np.uint8, location.num_bytes, location.offset)
        return torch.from_numpy(raw.copy()).view(*location.shape[:-1], -1)

    def load(
        self, name: str, dtype: torch.dtype = torch.float32, *, part: int | None = None
    ) -> Tensor:
        """Returns a tensor, or slice `part` of its slowest dimension, dequantized to `dtype`.

        A large tensor already stored in `dtype` shares the memory-mapped pages of the file.

        Raises:
            CheckpointError: the tensor's type is not supported.
        """
        location = self.tensors[name]
        if part is not None:
            location = location.part(part)
        raw = np.frombuffer(self._map, np.uint8, location.num_bytes, location.offset)
        try:
            found = _dequantize(raw, location).to(dtype)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has the type {location.type_name}, which is not "
                "supported; convert the model to another type"
            ) from None
        if location.num_bytes < MIN_SHARED_BYTES and found.data_ptr() == raw.ctypes.data:
            return found.clone()
        return found

    def release_pages(self) -> None:
        """Lets the operating system reclaim the memory-mapped pages (`MADV_PAGEOUT`).

        Their content stays valid: it is read again on the next access, and modified pages are
        preserved.
        """
        with contextlib.suppress(OSError, AttributeError):
            self._map.madvise(MADV_PAGEOUT)


class _HeaderReader:
    """Parses the header; every read is bounded by the file size."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path = data, path
        self.size = len(data)
        self.at = 0

    def read(self) -> tuple[JsonObject, dict[str, GGUFTensor]]:
        try:
            return self._read()
        except (struct.error, UnicodeDecodeError, IndexError, OverflowError) as error:
            raise self._broken(f"{error} at byte {self.at}") from None

    def _read(self) -> tuple[JsonObject, dict[str, GGUFTensor]]:
        if self.data[:4] != MAGIC:
            raise CheckpointError(
                f"{self.path} is not a GGUF file (it starts with {self.data[:4]!r}); "
                "name a .gguf file, or download it again"
            )
        self.at = 4
        version = self._number("I")
        if version & 0xFFFF == 0 and version:  # the bytes of the version are swapped
            raise CheckpointError(
                f"{self.path} is a big-endian GGUF file, but only little-endian files are "
                f"supported; convert it with gguf-convert-endian {self.path} little "
                "(from the gguf package)"
            )
        if version not in VERSIONS:
            raise CheckpointError(
                f"{self.path} is GGUF version {version}, expected 2 or 3; "
                "convert it again with a current tool"
            )
        num_tensors, num_pairs = self._number("Q"), self._number("Q")
        # a key-value pair takes at least 13 bytes, a tensor record at least 24
        self._check_count(num_pairs, 13, "key-value pairs")
        metadata: JsonObject = {}
        for _ in range(num_pairs):
            key = self._string()
            if key in metadata:
                raise self._broken(f"key {key!r} occurs twice")
            metadata[key] = self._value(self._number("I"), 0)
        self._check_count(num_tensors, 24, "tensors")
        records = [self._record() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self._broken(f"alignment {alignment!r} is not a power of two")
        start = (self.at + alignment - 1) // alignment * alignment
        return metadata, self._place(records, start)

    def _record(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dims = self._number("I")
        if num_dims > MAX_DIMS:
            raise self._broken(f"tensor {name!r} has {num_dims} dims, expected at most {MAX_DIMS}")
        dims = tuple(self._number("Q") for _ in range(num_dims))
        return name, dims[::-1], self._number("I"), self._number("Q")

    def _place(
        self, records: list[tuple[str, tuple[int, ...], int, int]], start: int
    ) -> dict[str, GGUFTensor]:
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, type_id, offset in records:
            if name in tensors:
                raise self._broken(f"tensor {name!r} occurs twice")
            kind = GGUF_TYPES.get(type_id)
            if kind is None:
                raise self._broken(f"tensor {name!r} has the unknown type {type_id}")
            count = 1
            for size in shape:
                count *= size
            if count == 0:
                raise self._broken(f"tensor {name!r} has the empty shape {shape}")
            width = shape[-1] if shape else 1
            if width % kind.weights:
                raise self._broken(
                    f"tensor {name!r}: width {width} is not a multiple of {kind.weights}"
                )
            num_bytes = count // kind.weights * kind.num_bytes
            if start + offset + num_bytes > self.size:
                raise CheckpointError(
                    f"{self.path} is truncated: tensor {name!r} ends at byte "
                    f"{start + offset + num_bytes}, but the file has {self.size} bytes; "
                    "download or convert it again"
                )
            tensors[name] = GGUFTensor(name, shape, kind.name, start + offset, num_bytes)
        return tensors

    def _value(self, kind: int, depth: int) -> Json:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._broken(f"value type {kind} is unknown")
        if depth >= MAX_ARRAY_DEPTH:
            raise self._broken("arrays are nested too deeply")
        inner, count = self._number("I"), self._number("Q")
        if inner in _SCALARS:
            layout = f"<{count}{_SCALARS[inner]}"
            self._check_count(count, struct.calcsize(_SCALARS[inner]), "array items")
            values = struct.unpack_from(layout, self.data, self.at)
            self.at += struct.calcsize(layout)
            return list(values)
        self._check_count(count, 8, "array items")
        if inner == _STRING:
            return self._strings(count)
        return [self._value(inner, depth + 1) for _ in range(count)]

    def _strings(self, count: int) -> list[str]:
        data, at, size = self.data, self.at, self.size
        unpack = struct.Struct("<Q").unpack_from
        out = []
        for _ in range(count):
            (length,) = unpack(data, at)
            at += 8
            if length > size - at:
                raise self._broken(f"a string of {length} bytes at byte {at} exceeds the file")
            out.append(data[at : at + length].decode("utf-8"))
            at += length
        self.at = at
        return out

    def _string(self) -> str:
        return self._strings(1)[0]

    def _number(self, layout: str) -> Json:
        (value,) = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return value

    def _check_count(self, count: int, least_bytes: int, what: str) -> None:
        if count * least_bytes > self.size - self.at:
            raise self._broken(f"{count} {what} do not fit into the file")

    def _broken(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged or truncated: {reason}; download or convert it again"
        )


def _dequantize(raw: np.ndarray[Any, Any], location: GGUFTensor) -> Tensor:
    """fp32 values of a tensor; the `gguf` package dequantizes the less common block formats."""
    fast = _FAST.get(location.type_name)
    if fast is not None:
        return fast(torch.from_numpy(raw)).view(location.shape)
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[location.type_name]
    if location.type_name in ("F16", "F64"):
        values = raw.view(np.float16 if location.type_name == "F16" else np.float64).astype(
            np.float32
        )
    else:
        values = dequantize(raw, kind)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(location.shape)


def _float32(raw: Tensor) -> Tensor:
    return raw.view(torch.float32)


def _bfloat16(raw: Tensor) -> Tensor:
    return raw.view(torch.bfloat16).float()


def _q8_0(raw: Tensor) -> Tensor:
    """Blocks of 32 values: an fp16 scale and 32 int8."""
    blocks = raw.view(-1, 34)
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    return blocks[:, 2:].contiguous().view(torch.int8).float().mul_(scale)


def _q4_0(raw: Tensor) -> Tensor:
    """Blocks of 32 values: an fp16 scale and 16 bytes, with zero point 8.

    The low nibbles are values 0-15 of the block, the high nibbles values 16-31.
    """
    blocks = raw.view(-1, 18)
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(scale)


def _q4_1(raw: Tensor) -> Tensor:
    """Like Q4_0, but with an fp16 scale and an fp16 minimum: q · scale + minimum."""
    blocks = raw.view(-1, 20)
    head = blocks[:, :4].contiguous().view(torch.float16).float()
    return _nibbles(blocks[:, 4:]).mul_(head[:, :1]).add_(head[:, 1:])


def _nibbles(packed: Tensor) -> Tensor:
    """Unpacks bytes [N, 16] to fp32 values 0-15 [N, 32]."""
    return torch.cat([packed & 15, packed >> 4], dim=1).float()


_FAST = {"F32": _float32, "BF16": _bfloat16, "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}
