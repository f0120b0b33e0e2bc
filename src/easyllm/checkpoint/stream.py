"""Safetensors files of training states, written and read with little of them in memory at a time.

`checkpoint.store` maps or writes a file as a whole: its pages then stay in the process until the
end, which for the state of a paged optimizer is all of it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyllm.checkpoint.store import (
    MAX_SHARD_BYTES,
    MODEL_METADATA,
    model_files,
    open_safetensors,
    read_tensor,
    write_index,
)
from easyllm.core.atomic import output_errors

PIECE_BYTES = 2**24
"""Bytes written at a time."""
MAPPED_BYTES = 2**26
"""Bytes read from one mapping of a file before it is mapped anew."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in the header of a file."""


def stream_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    release: Callable[[Tensor], None],
    *,
    metadata: Mapping[str, str] | None = None,
    alignment: int = 8,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Writes a safetensors file piece by piece, but not atomically: see `atomic_directory`.

    Args:
        path: the file.
        tensors: the tensors by name.
        release: called with each piece of a contiguous CPU tensor after it has been written.
        metadata: texts by name for the header.
        alignment: the tensors start at a multiple of this number of bytes.
        read: returns a tensor's values when it is its turn, if `tensors` have none (`meta`).

    Raises:
        OutputError: the operating system does not allow writing there.
    """
    ordered, header = _header(tensors, metadata)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    with output_errors(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            tensor = tensors[name] if read is None else read(name)
            for piece in tensor.detach().contiguous().view(-1).split(_elements(tensor)):
                file.write(piece.cpu().view(torch.uint8).numpy().data)
                release(piece)
            del tensor  # before the next one is read


def stream_model_weights(
    folder: Path,
    forms: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model's weights into `folder` with one of them in memory at a time.

    Args:
        folder: the folder.
        forms: tensors without values (on the device `meta`), by the names in the file.
        read: returns a tensor with its values.
        max_shard_bytes: size of a file.

    Raises:
        OutputError: the operating system does not allow writing there.
    """
    files = model_files(forms, max_shard_bytes)
    for file, names in files.items():
        of_file = {name: forms[name] for name in names}
        stream_tensors(folder / file, of_file, _keep, metadata=MODEL_METADATA, read=read)
    write_index(folder, files, forms)


def _keep(_: Tensor) -> None:
    """Releases nothing: a tensor that was read for the file is freed with its last reference."""


def _header(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> tuple[list[str], dict[str, Any]]:
    """Returns the names in the order of the file, and its header."""
    # larger elements first, as in other programs' files, so that each tensor is aligned
    ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in ordered:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    return ordered, header


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, read when asked for and not kept.

    A tensor's pages leave the process at some time after it is freed, so that a caller who uses one
    tensor after another has only a few of them in memory.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is missing, damaged or truncated.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file, self._mapped = open_safetensors(path), 0
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._mapped >= MAPPED_BYTES:
            self._file, self._mapped = open_safetensors(self._path), 0
        tensor = read_tensor(self._file, name, self._path)
        self._mapped += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Under(Mapping[str, Tensor]):
    """The tensors of another mapping whose names start with a prefix, without it.

    Args:
        tensors: the other mapping.
        prefix: the prefix.
    """

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        found = (name for name in self._tensors if name.startswith(self._prefix))
        return (name.removeprefix(self._prefix) for name in found)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _elements(tensor: Tensor) -> int:
    """Returns the number of a tensor's elements that are written at a time."""
    return PIECE_BYTES // tensor.element_size()


__all__ = ["TensorFile", "Under", "stream_model_weights", "stream_tensors"]
