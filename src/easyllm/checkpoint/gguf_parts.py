"""Split GGUF files: a model in parts `NAME-00001-of-0000N.gguf` next to one another, read as one.

The first part holds the metadata; every part holds `split.no` (from 0), `split.count` and its share of the tensors
(llama.cpp's `gguf-split`).
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyllm.checkpoint.gguf import GGUFFile, GGUFTensor
from easyllm.core.errors import CheckpointError

MAX_PARTS = 10_000
_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class SplitGGUF:
    """The parts of a split GGUF file as one file.

    Attributes:
        path: the first part.
        metadata: the first part's.
        tensors: name → where it is, of all parts.

    Raises:
        CheckpointError: a part is missing, is another model's, or parts hold the same tensor.
    """

    def __init__(self, parts: list[GGUFFile]) -> None:
        first = parts[0]
        self.path, self.metadata = first.path, first.metadata
        self.tensors: dict[str, GGUFTensor] = {}
        self._owner: dict[str, GGUFFile] = {}
        self._parts = parts
        for part in parts:
            for name, place in part.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"tensor {name!r} is in {self._owner[name].path.name} and in {part.path.name}; "
                        "download the parts of one model again"
                    )
                self.tensors[name], self._owner[name] = place, part
        wanted = first.metadata.get("split.tensors.count", len(self.tensors))
        if len(self.tensors) != wanted:
            raise CheckpointError(
                f"the parts of {first.path} hold {len(self.tensors)} tensors, expected {wanted}; download them again"
            )

    def load(
        self, name: str, dtype: torch.dtype = torch.float32, *, part: int | None = None
    ) -> Tensor:
        """The tensor `name`, or slice `part` of its slowest dimension, dequantized, in row-major order."""
        return self._owner[name].load(name, dtype, part=part)

    def let_go(self) -> None:
        """Offers the system the memory of what has been read."""
        for part in self._parts:
            part.let_go()


def open_gguf(path: Path) -> GGUFFile | SplitGGUF:
    """A GGUF file; of a split one, whichever part is named, all parts.

    Raises:
        CheckpointError: the file, or a part that belongs to it, is missing or damaged.
    """
    named = GGUFFile(path)
    count = _number(named, "split.count", 1)
    if count <= 1:
        return named
    found = _NAME.fullmatch(named.path.name)
    if found is None or int(found["count"]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts of a split model, and its name does not say where the others are; "
            f"give all parts names like NAME-00001-of-{count:05d}.gguf in one folder"
        )
    names = [f"{found['stem']}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    missing = [name for name in names if not named.path.with_name(name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} is one of {count} parts of a split model, and {missing[0]} is not in its folder"
            f"{f' (nor are {len(missing) - 1} more)' if len(missing) > 1 else ''}; download every part into one folder"
        )
    parts = []
    for number, name in enumerate(names):
        part = named if name == named.path.name else GGUFFile(named.path.with_name(name))
        if _number(part, "split.no", -1) != number or _number(part, "split.count", 1) != count:
            raise CheckpointError(
                f"{part.path} is not part {number + 1} of {count}, as its name says; download it again"
            )
        parts.append(part)
    return SplitGGUF(parts)


def _number(file: GGUFFile, key: str, default: int) -> int:
    value: Any = file.metadata.get(key, default)
    if not isinstance(value, int) or not -1 <= value <= MAX_PARTS:
        raise CheckpointError(f"{file.path} sets {key}={value!r}; download or convert it again")
    return value
