"""Sequence packing: sequences concatenated along one token axis T, without padding.

Each sequence attends only to itself (a block-diagonal mask given by `cu_seqlens`).

token_ids  a b c d | e f g          labels[t] is the target that should follow token t,
labels     b c d - | f g -          or -100 for a token without loss
positions  0 1 2 3 | 0 1 2
cu_seqlens 0 4 7
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.examples.sample import POSITION_ROWS, AnySample, Sample
from easyllm.nn.config import ModelConfig
from easyllm.nn.context import AdapterRows, ForwardContext, block_position_rows
from easyllm.ops.cross_entropy import IGNORE_INDEX

_NO_EXTRAS: Mapping[str, Any] = {}


class Sized(Protocol):
    """Anything with a number of tokens."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""


S = TypeVar("S", bound=Sized)


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of S packed sequences of T tokens in total.

    Attributes:
        token_ids: [T] int64.
        labels: [T] int64, the next token, or -100 for no loss.
        positions: [T] int64, counted from 0 in each sequence.
        cu_seqlens: [S+1] int32, cumulative sequence lengths: the start of each sequence, then T.
        lengths: S sequence lengths.
        num_trained: number of tokens with a loss.
        extras: extra inputs of the objective by name, [S, ...] per sequence or [T, ...] per token.
        token_extras: names of the per-token extras.
        is_filler: whether the batch counts for nothing: a rank without a micro-batch computes one
            to take part in the collectives of the others.
        common_prefix: a number of first tokens that all sequences have in common and that none ends
            with, such as those of a system prompt; 0 where it is not known.
    """

    token_ids: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    num_trained: int
    extras: Mapping[str, Tensor] = field(default_factory=lambda: _NO_EXTRAS)
    token_extras: frozenset[str] = frozenset()
    is_filler: bool = False
    common_prefix: int = 0

    def context(
        self,
        *,
        mask: ModelConfig | None = None,
        deterministic: bool = False,
        base_only: bool = False,
        routing: list[Any] | None = None,
    ) -> ForwardContext:
        """Returns the context that a forward pass over this batch needs.

        Args:
            mask: the model, whose `prompt_mask` applies to the tokens before the first label of a
                sequence; None for a causal mask.
            deterministic: compute batch-invariant results.
            base_only: disable the model's adapter.
            routing: a list that collects the decisions of MoE routers.
        """
        index = torch.zeros_like(self.positions) if base_only else None
        prefixes = None
        if mask is not None and mask.has_prefix:
            prefixes = self.prefix_lengths(mask)
        return ForwardContext(
            positions=self.positions,
            lengths=self.lengths,
            prefix_lengths=prefixes,
            position_rows=self._position_rows(prefixes),
            deterministic=deterministic,
            adapters=None if index is None else AdapterRows(("",), index),
            routing=routing,
        )

    def _position_rows(self, prefixes: tuple[int, ...] | None) -> Tensor | None:
        """Returns the two position rows [2, T] of GLM: those of the samples, or by prefixes."""
        if POSITION_ROWS in self.extras:
            return self.extras[POSITION_ROWS].T
        if prefixes is None:
            return None
        return block_position_rows(self.positions, self.lengths, prefixes)

    def prefix_lengths(self, mask: ModelConfig) -> tuple[int, ...]:
        """Returns the prefix length of each sequence.

        The prefix ends with the token that predicts the first label, or as many tokens before it as
        the model excludes. A sequence without labels is all prefix.
        """
        excludes, lengths = mask.prefix_excludes, list[int]()
        for labels in self.labels.split(self.lengths):
            trained = (labels != IGNORE_INDEX).nonzero()
            lengths.append(int(trained[0]) + 1 - excludes if len(trained) else len(labels))
        return tuple(lengths)

    def padded_to_multiple(self, multiple: int) -> "Batch":
        """Returns the batch padded to a multiple of `multiple` tokens.

        The padding is one more sequence at the end, with token id 0, no labels and zero extras.
        """
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
            self.is_filler,
        )

    def select(self, sequences: Sequence[int]) -> "Batch":
        """Returns a batch of some of the sequences, given by their numbers in ascending order."""
        device = self.token_ids.device
        starts = [0, *accumulate(self.lengths)]
        tokens = torch.cat(
            [torch.arange(starts[n], starts[n + 1]) for n in sequences] or [torch.arange(0)]
        ).to(device)
        index = torch.tensor(sequences, dtype=torch.int64, device=device)
        lengths = tuple(self.lengths[n] for n in sequences)
        labels = self.labels[tokens]
        return Batch(
            self.token_ids[tokens],
            labels,
            self.positions[tokens],
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
            lengths,
            int((labels != IGNORE_INDEX).sum()),
            {
                name: values[tokens if name in self.token_extras else index]
                for name, values in self.extras.items()
            },
            self.token_extras,
        )

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch with its tensors on `device`."""
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
            self.is_filler,
            self.common_prefix,
        )


def pack(samples: Sequence[AnySample]) -> Batch:
    """Packs samples into one batch; the sequences of a group are adjacent."""
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
        common_prefix=common_prefix(parts),
    )


def common_prefix(parts: Sequence[Sample]) -> int:
    """Returns how many first tokens all samples share, at most all but the last of each."""
    if len(parts) < 2:
        return 0
    first, last = min(p.token_ids for p in parts), max(p.token_ids for p in parts)
    most = min(len(p.token_ids) for p in parts) - 1
    pairs = zip(first[:most], last[:most], strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), max(most, 0))


def _packed_extras(parts: Sequence[Sample]) -> tuple[Mapping[str, Tensor], frozenset[str]]:
    """Returns the extras of all samples as tensors, and the names of the per-token extras."""
    names = parts[0].extras.keys() if parts else ()
    assert all(part.extras.keys() == names for part in parts), "all samples need the same extras"
    if not names:
        return _NO_EXTRAS, frozenset()
    packed, of_tokens = dict[str, Tensor](), set[str]()
    for name in names:
        values = [torch.as_tensor(part.extras[name]) for part in parts]
        if all(value.ndim == 0 for value in values):
            packed[name] = torch.stack(values)
            continue
        fits = all(len(v) == part.num_tokens for v, part in zip(values, parts, strict=True))
        assert fits, f"extra {name!r} must be one number, or one number per token"
        packed[name] = torch.cat(values)
        of_tokens.add(name)
    return packed, frozenset(of_tokens)


def split_by_tokens(samples: Iterable[S], max_tokens: int) -> list[list[S]]:
    """Groups consecutive samples so that each group has at most `max_tokens` tokens.

    A sample longer than `max_tokens` forms its own group.
    """
    groups: list[list[S]] = []
    padded_to_multiple = 0
    for sample in samples:
        size = sample.num_tokens
        if not groups or padded_to_multiple + size > max_tokens:
            groups.append([])
            padded_to_multiple = 0
        groups[-1].append(sample)
        padded_to_multiple += size
    return groups
