"""Split GGUF files: the parts `NAME-00001-of-0000N.gguf` of a model in a folder, read as one file.

The first part contains the metadata; every part contains `split.no` (from 0), `split.count` and
some of the tensors (llama.cpp's `gguf-split`).
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from easyllm.checkpoint.gguf import GGUFFile, GGUFTensor
from easyllm.core.errors import CheckpointError

if TYPE_CHECKING:
    from easyllm.core.json_types import Json

MAX_PARTS = 10_000
_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class SplitGGUF:
    """A split GGUF file with the interface of a single one.

    Attributes:
        path: the first part.
        metadata: the metadata of the first part.
        tensors: the location of each tensor of all parts, by name.
        files: all parts, as they were before they were opened.

    Raises:
        CheckpointError: tensors are missing or occur in several parts.
    """

    def __init__(self, parts: list[GGUFFile]) -> None:
        first = parts[0]
        self.path, self.metadata = first.path, first.metadata
        self.files = [state for part in parts for state in part.files]
        self.tensors: dict[str, GGUFTensor] = {}
        self._owner: dict[str, GGUFFile] = {}
        self._parts = parts
        for part in parts:
            for name, location in part.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"tensor {name!r} is in both {self._owner[name].path.name} and "
                        f"{part.path.name}; download all parts of the model again"
                    )
                self.tensors[name], self._owner[name] = location, part
        wanted = first.metadata.get("split.tensors.count", len(self.tensors))
        if len(self.tensors) != wanted:
            raise CheckpointError(
                f"the parts of {first.path} contain {len(self.tensors)} tensors, "
                f"expected {wanted}; download them again"
            )

    def load(
        self, name: str, dtype: torch.dtype = torch.float32, *, part: int | None = None
    ) -> Tensor:
        """Returns a tensor, or slice `part` of its slowest dimension, dequantized to `dtype`."""
        return self._owner[name].load(name, dtype, part=part)

    def raw(self, name: str, *, part: int | None = None) -> Tensor:
        """Returns a copy of the bytes of a tensor, or of slice `part` of its slowest dimension."""
        return self._owner[name].raw(name, part=part)

    def release_pages(self) -> None:
        """Lets the operating system reclaim the memory-mapped pages of all parts."""
        for part in self._parts:
            part.release_pages()


def open_gguf(path: Path) -> GGUFFile | SplitGGUF:
    """Opens a GGUF file; for any part of a split file, all parts.

    Raises:
        CheckpointError: the file, or another part of it, is missing or damaged.
    """
    named = GGUFFile(path)
    count = _number(named, "split.count", 1)
    if count <= 1:
        return named
    found = _NAME.fullmatch(named.path.name)
    if found is None or int(found["count"]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts of a split model, but the names of the others cannot "
            f"be derived from its name; name the parts NAME-00001-of-{count:05d}.gguf and so on, "
            "in one folder"
        )
    names = [f"{found['stem']}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    missing = [name for name in names if not named.path.with_name(name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} is one of {count} parts of a split model, but {missing[0]} is not in its "
            f"folder{f' (nor are {len(missing) - 1} others)' if len(missing) > 1 else ''}; "
            "download all parts into one folder"
        )
    parts = []
    for number, name in enumerate(names):
        part = named if name == named.path.name else GGUFFile(named.path.with_name(name))
        if _number(part, "split.no", -1) != number or _number(part, "split.count", 1) != count:
            raise CheckpointError(
                f"{part.path} is not part {number + 1} of {count}, although its name says so; "
                "download it again"
            )
        parts.append(part)
    return SplitGGUF(parts)


def _number(file: GGUFFile, key: str, default: int) -> int:
    value: Json = file.metadata.get(key, default)
    if not isinstance(value, int) or not -1 <= value <= MAX_PARTS:
        raise CheckpointError(
            f"{file.path} has the invalid value {key}={value!r}; download or convert it again"
        )
    return value
