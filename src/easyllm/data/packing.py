"""The one packed layout: sequences end to end in T, isolated by their boundaries.

token_ids  a b c d | e f g          labels[t] is the token that should follow token t,
labels     b c d - | f g -          or -100 where no loss is taken
positions  0 1 2 3 | 0 1 2
cu_seqlens 0 4 7
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.nn.context import AdapterRows, ForwardContext
from easyllm.ops.cross_entropy import IGNORE_INDEX

_NO_EXTRAS: Mapping[str, Any] = {}
S = TypeVar("S", bound="Sample | SampleGroup")


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence: its ids, and for each the label that should follow (-100: no loss)."""

    token_ids: tuple[int, ...]
    labels: tuple[int, ...]
    extras: Mapping[str, Any] = field(default_factory=lambda: _NO_EXTRAS, hash=False)
    """What an objective wants of the sequence: a number, or one for each token (a sequence of `len(token_ids)`)."""

    @property
    def parts(self) -> "tuple[Sample, ...]":
        """The sequences of this sample: itself."""
        return (self,)

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward pass."""
        return len(self.token_ids)

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
class SampleGroup:
    """Sequences that stay together in a batch, one after the other: the answers of a pair, say."""

    parts: tuple[Sample, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward pass."""
        return sum(part.num_tokens for part in self.parts)

    @property
    def num_trained(self) -> int:
        """Tokens that carry a loss."""
        return sum(part.num_trained for part in self.parts)


AnySample = Sample | SampleGroup


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed sequences.

    Attributes:
        token_ids: [T] int64.
        labels: [T] int64, the token that should follow, -100 where no loss.
        positions: [T] int64, counted from 0 in each sequence.
        cu_seqlens: [S+1] int32, where each sequence begins, and T.
        extras: what the objective wants of the samples, by name: [S, ...] for the sequences, [T, ...] for the tokens.
        token_extras: names of the extras that have a row for each token.
    """

    token_ids: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    num_trained: int
    extras: Mapping[str, Tensor] = field(default_factory=lambda: _NO_EXTRAS)
    token_extras: frozenset[str] = frozenset()

    def context(
        self,
        *,
        prefix: bool = False,
        deterministic: bool = False,
        base_only: bool = False,
        routing: list[Any] | None = None,
    ) -> ForwardContext:
        """What a forward pass needs to know of this batch.

        Args:
            prefix: tokens before the first label of a sequence see each other both ways (prefix language model).
            deterministic: batch-invariant results.
            base_only: the model's adapter is passed over.
            routing: a list for the routers' decisions.
        """
        index = torch.zeros_like(self.positions) if base_only else None
        return ForwardContext(
            positions=self.positions,
            lengths=self.lengths,
            prefix_lengths=self._prefix_lengths() if prefix else None,
            deterministic=deterministic,
            adapters=None if index is None else AdapterRows(("",), index),
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
        """The batch with its tokens filled up to a multiple: by a sequence of id 0 after the others, without labels, whose
        extras are zero."""
        missing = -len(self.token_ids) % multiple
        if not missing:
            return self
        end = self.cu_seqlens[-1:] + missing
        extras = {
            name: torch.cat(
                [x, x.new_zeros(missing if name in self.token_extras else 1, *x.shape[1:])]
            )
            for name, x in self.extras.items()
        }
        return Batch(
            F.pad(self.token_ids, (0, missing)),
            F.pad(self.labels, (0, missing), value=IGNORE_INDEX),
            torch.cat([self.positions, torch.arange(missing, device=self.positions.device)]),
            torch.cat([self.cu_seqlens, end]),
            (*self.lengths, missing),
            self.num_trained,
            extras,
            self.token_extras,
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
            {name: tensor.to(device) for name, tensor in self.extras.items()},
            self.token_extras,
        )


def pack(samples: Sequence[AnySample]) -> Batch:
    """Lays samples end to end; the sequences of a group one after the other."""
    parts = [part for sample in samples for part in sample.parts]
    lengths = tuple(len(s.token_ids) for s in parts)
    extras, of_tokens = _packed_extras(parts)
    return Batch(
        token_ids=torch.tensor([t for s in parts for t in s.token_ids], dtype=torch.int64),
        labels=torch.tensor([t for s in parts for t in s.labels], dtype=torch.int64),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        lengths=lengths,
        num_trained=sum(s.num_trained for s in parts),
        extras=extras,
        token_extras=of_tokens,
    )


def _packed_extras(parts: Sequence[Sample]) -> tuple[Mapping[str, Tensor], frozenset[str]]:
    """Every extra of the samples as a tensor, and the names of those that have a row for each token."""
    names = parts[0].extras.keys() if parts else ()
    assert all(part.extras.keys() == names for part in parts), "all samples have the same extras"
    if not names:
        return _NO_EXTRAS, frozenset()
    packed, of_tokens = dict[str, Tensor](), set[str]()
    for name in names:
        values = [torch.as_tensor(part.extras[name]) for part in parts]
        if all(value.ndim == 0 for value in values):
            packed[name] = torch.stack(values)
            continue
        fits = all(len(v) == part.num_tokens for v, part in zip(values, parts, strict=True))
        assert fits, f"extra {name!r} is a number, or has one for each token"
        packed[name] = torch.cat(values)
        of_tokens.add(name)
    return packed, frozenset(of_tokens)


def split_by_tokens(samples: Iterable[S], max_tokens: int) -> list[list[S]]:
    """Samples in order, grouped so that each group has at most `max_tokens` (a longer sample is alone)."""
    groups: list[list[S]] = []
    filled = 0
    for sample in samples:
        size = sample.num_tokens
        if not groups or filled + size > max_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(sample)
        filled += size
    return groups
