"""Samples: one sequence of token ids with a label for each, or several that stay together."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from easyllm.core.json_types import JsonMapping
from easyllm.ops.cross_entropy import IGNORE_INDEX

POSITION_ROWS = "position_rows"
"""Name of the per-token extra with GLM's two positions, [T, 2] int64."""
_NO_EXTRAS: JsonMapping = {}


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence: its token ids, and the label of each (the next token, or -100 for no loss)."""

    token_ids: tuple[int, ...]
    labels: tuple[int, ...]
    extras: JsonMapping = field(default_factory=lambda: _NO_EXTRAS, hash=False)
    """Extra inputs of the objective by name: one number per sequence, or a sequence of
    `len(token_ids)` numbers, one per token."""

    @property
    def parts(self) -> "tuple[Sample, ...]":
        """The sequences of this sample, namely itself; `SampleGroup` has several."""
        return (self,)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the forward pass."""
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        """Number of tokens with a loss."""
        return sum(label != IGNORE_INDEX for label in self.labels)

    @classmethod
    def from_mask(cls, token_ids: Sequence[int], mask: Sequence[bool] | None = None) -> "Sample":
        """Builds a sample from token ids and a loss mask.

        The last id is only a label and never an input, because no token follows it.

        Args:
            mask: whether each id is a training target; None trains all.
        """
        targets = token_ids[1:]
        if mask is not None:
            targets = [t if m else IGNORE_INDEX for t, m in zip(targets, mask[1:], strict=True)]
        return cls(tuple(token_ids[:-1]), tuple(targets))


@dataclass(frozen=True, slots=True)
class SampleGroup:
    """Sequences that stay adjacent in a batch, such as the two responses of a preference pair."""

    parts: tuple[Sample, ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the forward pass."""
        return sum(part.num_tokens for part in self.parts)

    @property
    def num_trained(self) -> int:
        """Number of tokens with a loss."""
        return sum(part.num_trained for part in self.parts)


AnySample = Sample | SampleGroup


__all__ = ["POSITION_ROWS", "AnySample", "Sample", "SampleGroup"]
