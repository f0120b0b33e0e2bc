"""Which part of a full tensor a rank holds.

A piece is a slice along one axis (tensor parallel), of which a range of the flattened elements is
kept (ZeRO and FSDP, which shard rows):

    full [6, 4] ── axis 0, rows 3:6 ──> [3, 4] ── flat 0:6 ──> [6]
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from easyllm.core.json_types import JsonMapping, JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a full tensor.

    Attributes:
        shape: shape of the full tensor.
        axis, low, high: the slice `low:high` along `axis`; an axis of -1 means the full tensor.
        start, stop: range of the flattened slice.
    """

    shape: tuple[int, ...]
    axis: int = -1
    low: int = 0
    high: int = 0
    start: int
    stop: int

    @classmethod
    def whole(cls, shape: Iterable[int]) -> "Piece":
        """Returns the piece that is the full tensor."""
        full = tuple(shape)
        return cls(shape=full, start=0, stop=math.prod(full))

    @classmethod
    def slice(cls, shape: Iterable[int], axis: int, low: int, high: int) -> "Piece":
        """Returns the slice `low:high` along an axis."""
        full = tuple(shape)
        count = math.prod(full) // full[axis] * (high - low)
        return cls(shape=full, axis=axis, low=low, high=high, start=0, stop=count)

    def flat(self, start: int, stop: int) -> "Piece":
        """Returns the range `start:stop` of the flattened slice."""
        return Piece(
            shape=self.shape, axis=self.axis, low=self.low, high=self.high, start=start, stop=stop
        )

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    def of_slice(self, sliced: Tensor) -> Tensor:
        """Returns the flat range of the slice that tensor parallelism has cut already."""
        return sliced.reshape(-1)[self.start : self.stop]

    def cut(self, full: Tensor) -> Tensor:
        """Returns the piece's elements of the full tensor, flat."""
        return self.of_slice(self._sliced(full))

    def paste(self, full: Tensor, values: Tensor) -> None:
        """Writes the piece's elements, of any shape, into the full tensor."""
        target = self._sliced(full)
        flat = target.reshape(-1)  # a copy unless the slice is contiguous
        flat[self.start : self.stop] = values.reshape(-1).to(full.device, full.dtype)
        if flat.data_ptr() != target.data_ptr():
            target.copy_(flat.view(target.shape))

    def _sliced(self, full: Tensor) -> Tensor:
        if self.axis < 0:
            return full
        return full.narrow(self.axis, self.low, self.high - self.low)

    def to_json(self) -> JsonObject:
        """Returns plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: JsonMapping) -> "Piece":
        """Returns the piece that `to_json` described.

        Raises:
            TypeError, ValueError: the values describe no piece.
        """
        plain = dict(values)
        return cls(shape=tuple(int(n) for n in plain.pop("shape")), **plain)


def assemble(pieces: Iterable[tuple[Piece, Tensor]], dtype: torch.dtype) -> Tensor:
    """Returns the full tensor of which all pieces are given, on the CPU.

    Raises:
        ValueError: an element is in none of the pieces.
    """
    full: Tensor | None = None
    covered: Tensor | None = None
    for piece, values in pieces:
        if full is None or covered is None:
            full = torch.empty(piece.shape, dtype=dtype)
            covered = torch.zeros(piece.shape, dtype=torch.bool)
        piece.paste(full, values.cpu())
        piece.paste(covered, torch.ones(piece.numel, dtype=torch.bool))
    if full is None or covered is None or not bool(covered.all()):
        raise ValueError("parts of a tensor are missing")
    return full


__all__ = ["Piece", "assemble"]
