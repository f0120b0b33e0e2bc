"""Rows of different lengths in one flat array: the hashes of many texts without an object a text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

U64: TypeAlias = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of 64-bit hashes, end to end.

    Attributes:
        values: [N] uint64.
        offsets: [n + 1] int64; row i is `values[offsets[i]:offsets[i + 1]]`.
    """

    values: U64
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> U64:
        """The hashes of row `index`."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[n] values in each row."""
        return np.diff(self.offsets)

    def split(self, marks: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
        """Marks of all values [N], row by row."""
        return [marks[begin:end] for begin, end in pairwise(self.offsets.tolist())]

    @classmethod
    def from_rows(cls, rows: Sequence[U64]) -> "Ragged":
        """The rows laid end to end."""
        return cls(
            np.concatenate(rows) if rows else np.empty(0, np.uint64),
            starts([len(row) for row in rows]),
        )

    @classmethod
    def concatenate(cls, parts: Iterable["Ragged"]) -> "Ragged":
        """All rows of the parts, in their order."""
        parts = list(parts)
        if not parts:
            return cls.from_rows([])
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(np.concatenate([part.values for part in parts]), starts(lengths))


def starts(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """[n + 1] where each row begins, and the total."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
