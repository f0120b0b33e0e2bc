"""The one packed layout: sequences end to end in T, isolated by their boundaries.

token_ids  a b c d | e f g          labels[t] is the token that should follow token t,
labels     b c d - | f g -          or -100 where no loss is taken
positions  0 1 2 3 | 0 1 2
cu_seqlens 0 4 7
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.ops.attention import AttentionContext
from easyllm.ops.cross_entropy import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence: its ids, and for each the label that should follow (-100: no loss)."""

    token_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def num_trained(self) -> int:
        """Tokens that carry a loss."""
        return sum(label != IGNORE_INDEX for label in self.labels)

    @classmethod
    def from_mask(cls, token_ids: Sequence[int], mask: Sequence[bool] | None = None) -> "Sample":
        """A sample from ids and which of them are trained (all when None).

        The last id is never an input: nothing follows it.
        """
        targets = token_ids[1:]
        if mask is not None:
            targets = [t if m else IGNORE_INDEX for t, m in zip(targets, mask[1:], strict=True)]
        return cls(tuple(token_ids[:-1]), tuple(targets))


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed sequences.

    Attributes:
        token_ids: [T] int64.
        labels: [T] int64, the token that should follow, -100 where no loss.
        positions: [T] int64, counted from 0 in each sequence.
        cu_seqlens: [S+1] int32, where each sequence begins, and T.
    """

    token_ids: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    num_trained: int

    def context(
        self, *, prefix: bool = False, routing: list[Any] | None = None
    ) -> AttentionContext:
        """What attention needs to know of this batch.

        Args:
            prefix: tokens before the first label of a sequence see each other both ways (prefix language model).
            routing: a list for the routers' decisions.
        """
        return AttentionContext(
            positions=self.positions,
            lengths=self.lengths,
            prefix_lengths=self._prefix_lengths() if prefix else None,
            routing=routing,
        )

    def _prefix_lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence whose successor is given too; the one that predicts the first label belongs to them."""
        lengths = []
        for labels in self.labels.split(self.lengths):
            trained = (labels != IGNORE_INDEX).nonzero()
            lengths.append(int(trained[0]) + 1 if len(trained) else len(labels))
        return tuple(lengths)

    def filled(self, multiple: int) -> "Batch":
        """The batch with its tokens filled up to a multiple: by a sequence of id 0 behind the others, without labels."""
        missing = -len(self.token_ids) % multiple
        if not missing:
            return self
        end = self.cu_seqlens[-1:] + missing
        return Batch(
            F.pad(self.token_ids, (0, missing)),
            F.pad(self.labels, (0, missing), value=IGNORE_INDEX),
            torch.cat([self.positions, torch.arange(missing, device=self.positions.device)]),
            torch.cat([self.cu_seqlens, end]),
            (*self.lengths, missing),
            self.num_trained,
        )

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        if self.token_ids.device == device:
            return self
        return Batch(
            self.token_ids.to(device),
            self.labels.to(device),
            self.positions.to(device),
            self.cu_seqlens.to(device),
            self.lengths,
            self.num_trained,
        )


def pack(samples: Sequence[Sample]) -> Batch:
    """Lays samples end to end."""
    lengths = tuple(len(s.token_ids) for s in samples)
    return Batch(
        token_ids=torch.tensor([t for s in samples for t in s.token_ids], dtype=torch.int64),
        labels=torch.tensor([t for s in samples for t in s.labels], dtype=torch.int64),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        lengths=lengths,
        num_trained=sum(s.num_trained for s in samples),
    )


def split_by_tokens(samples: Iterable[Sample], max_tokens: int) -> list[list[Sample]]:
    """Samples in order, grouped so that each group has at most `max_tokens` (a longer sample is alone)."""
    groups: list[list[Sample]] = []
    filled = 0
    for sample in samples:
        size = len(sample.token_ids)
        if not groups or filled + size > max_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(sample)
        filled += size
    return groups
