"""Ragged arrays: rows of different lengths in one flat array, without one Python object per row."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

U64: TypeAlias = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Ragged:
    """Concatenated rows of 64-bit hashes.

    Attributes:
        values: [N] uint64, the values of all rows.
        offsets: [n + 1] int64; row i is `values[offsets[i]:offsets[i + 1]]`.
    """

    values: U64
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> U64:
        """Returns the values of row `index`, a view."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[n] int64, the number of values in each row."""
        return np.diff(self.offsets)

    def split(self, marks: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
        """Splits `marks` [N], one per value, into rows."""
        return [marks[begin:end] for begin, end in pairwise(self.offsets.tolist())]

    @classmethod
    def from_rows(cls, rows: Sequence[U64]) -> "Ragged":
        """Returns the concatenation of the rows."""
        return cls(
            np.concatenate(rows) if rows else np.empty(0, np.uint64),
            starts([len(row) for row in rows]),
        )

    @classmethod
    def concatenate(cls, parts: Iterable["Ragged"]) -> "Ragged":
        """Returns all rows of the parts, in order."""
        parts = list(parts)
        if not parts:
            return cls.from_rows([])
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(np.concatenate([part.values for part in parts]), starts(lengths))


def starts(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns [n + 1] int64, the start offset of each row, and the total length."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
