"""Batch information that is passed to all parts of a forward pass.

It is an argument, never a global variable or a flag on a module, so two engines can share one
model: each passes its own context, and the model stays unchanged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from easyllm.ops.attention_rule import AttentionRule

T = TypeVar("T")
State: TypeAlias = Any
"""The recurrent state of a layer, whose type only the layer knows."""


class KeyValueStore(Protocol):
    """Stores keys, values and states between forward passes; implemented by the engine's cache."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        rule: AttentionRule,
        prefix_lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Stores `k`, `v: [T, K, d]` of `layer`; returns the output for `q: [T, H, d]`.

        Without `v` the keys are the values, too, and only they are stored.
        """

    def recur(self, layer: int, step: "RecurrentStep", *inputs: Tensor) -> Tensor:
        """Runs `step` on each sequence's inputs, starting from the sequence's last state."""


class RecurrentStep(Protocol):
    """Maps one sequence's tokens and its state (None at the start) to its output and new state."""

    def __call__(self, *inputs: Tensor, state: State) -> tuple[Tensor, State]: ...


class VirtualRows(Protocol):
    """The virtual tokens of a forward pass (`nn/virtual_tokens`)."""

    def keys_values(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values [T, K, d] with the rows of virtual tokens replaced by theirs."""


@dataclass(frozen=True, eq=False)
class AdapterRows:
    """The adapter that each row of a forward pass uses.

    Attributes:
        names: names of the adapters; `""` is the base model without an adapter.
        index: [T] int64, the index of each row's adapter in `names`.
    """

    names: tuple[str, ...]
    index: Tensor

    @classmethod
    def of_sequences(
        cls, names: Sequence[str], lengths: Sequence[int], *, device: torch.device | str = "cpu"
    ) -> "AdapterRows":
        """Returns the adapters of all rows, given the adapter and length of each sequence."""
        known = tuple(dict.fromkeys(names))
        numbers = torch.tensor([known.index(name) for name in names], dtype=torch.int64)
        return cls(known, numbers.repeat_interleave(torch.tensor(lengths)).to(device))

    @cached_property
    def groups(self) -> tuple[tuple[str, Tensor | None], ...]:
        """Each adapter in use with the indices of its rows; None means all rows."""
        if len(self.names) == 1:
            return ((self.names[0], None),)
        found = [
            (name, (self.index == i).nonzero().squeeze(1)) for i, name in enumerate(self.names)
        ]
        return tuple((name, rows) for name, rows in found if len(rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRows:
    """Rows that several sequences have in common: a prompt is computed once for its responses.

    rows       p p p a a b b        T rows: embeddings, norms, linears and feed-forward blocks
    sequences  p p p a a p p p b b  T' tokens: only mixers see complete sequences

    Attributes:
        row_of: [T'] int64, the row of each token of the complete sequences.
        token_of: [T] int64, for each row, the first token of the sequences that has it.
        sequences: the context of the complete sequences.
    """

    row_of: Tensor
    token_of: Tensor
    sequences: "ForwardContext"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardContext:
    """Everything that a forward pass needs to know about a batch apart from the token ids.

    Attributes:
        positions: [T] int64, the position of each token in its sequence.
        lengths: number of tokens of each sequence in this forward pass; they sum to T.
        prefix_lengths: number of first tokens of each sequence that see each other in both
            directions (UniLM's mask); with a store, the first pass of a sequence must contain the
            complete prefix.
        position_rows: [2, T] int64, the two positions of each token for GLM's 2-D positions: in the
            text, where a block has that of its mask, and in the block (`block_position_rows`);
            None for a text without blocks.
        store: the KV cache with earlier keys and values; None if all keys are in this pass.
        deterministic: whether results are batch-invariant: a row is bitwise independent of the
            other rows (`nn/deterministic`).
        adapters: the adapter of each row, if several are attached; None applies a layer's own
            adapter to all rows.
        virtual: which rows are virtual tokens of a model-level adapter; set by the decoder.
        routing: a list to which each MoE layer appends its `Routing`, or None.
        shared: which rows belong to several sequences; None if each row is a token of one. With it,
            `lengths` are those of groups of sequences; without a store and virtual tokens only.
        memo: values that are computed once per forward pass and shared by the layers.
    """

    positions: Tensor
    lengths: tuple[int, ...]
    prefix_lengths: tuple[int, ...] | None = None
    position_rows: Tensor | None = None
    store: KeyValueStore | None = None
    deterministic: bool = False
    adapters: AdapterRows | None = None
    virtual: VirtualRows | None = None
    routing: list[Any] | None = None
    shared: SharedRows | None = None
    memo: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def packed(
        cls,
        lengths: list[int] | tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        store: KeyValueStore | None = None,
        offsets: list[int] | None = None,
        prefix_lengths: tuple[int, ...] | None = None,
        position_rows: Tensor | None = None,
        deterministic: bool = False,
        adapters: AdapterRows | None = None,
        routing: list[Any] | None = None,
    ) -> "ForwardContext":
        """Returns the context of packed (concatenated) sequences.

        Args:
            lengths: number of tokens of each sequence.
            offsets: first position of each sequence; 0 by default.
        """
        offsets = offsets or [0] * len(lengths)
        parts = [
            torch.arange(start, start + n, device=device)
            for n, start in zip(lengths, offsets, strict=True)
        ]
        positions = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)
        return cls(
            positions=positions,
            lengths=tuple(lengths),
            store=store,
            prefix_lengths=prefix_lengths,
            position_rows=position_rows,
            deterministic=deterministic,
            adapters=adapters,
            routing=routing,
        )

    @property
    def base_only(self) -> bool:
        """Whether all rows use the base model without an adapter."""
        return self.adapters is not None and self.adapters.names == ("",)

    @property
    def of_sequences(self) -> "ForwardContext":
        """The context of complete sequences, for mixers: itself unless rows are shared."""
        return self if self.shared is None else self.shared.sequences

    def to_sequences(self, rows: Tensor) -> Tensor:
        """Returns `rows: [T, ...]` as tokens of complete sequences, [T', ...]."""
        return rows if self.shared is None else rows.index_select(0, self.shared.row_of)

    def to_rows(self, tokens: Tensor) -> Tensor:
        """Returns tokens of complete sequences, `[T', ...]`, as rows [T, ...]."""
        return tokens if self.shared is None else tokens.index_select(0, self.shared.token_of)

    def once(self, key: object, compute: Callable[[], T]) -> T:
        """Returns the value of `compute()`, which is called only once per `key` and memoised."""
        if key not in self.memo:
            self.memo[key] = compute()
        found: T = self.memo[key]
        return found

    def of_rows(self, rows: Tensor) -> "ForwardContext":
        """Returns the context of selected rows, for row-wise parts (an expert, the head)."""
        if self.adapters is None:
            return self
        return replace(self, adapters=AdapterRows(self.adapters.names, self.adapters.index[rows]))


def block_position_rows(
    positions: Tensor, lengths: tuple[int, ...], starts: tuple[int, ...]
) -> Tensor:
    """Returns the position rows [2, T] of prompts that are followed by one generated block.

    A token of the prompt at position p has (p, 0); the n-th token of the block, from 1, has the
    position of the prompt's last token (GLM's mask) and n (Du et al. 2021, arXiv 2103.10360,
    section 2.2.1).

    Args:
        positions: [T] int64, the position of each token in its sequence.
        lengths: number of tokens of each sequence.
        starts: the position at which the block of each sequence starts.
    """
    counts = torch.tensor(lengths, device=positions.device)
    start = torch.tensor(starts, device=positions.device).repeat_interleave(counts)
    in_text = torch.minimum(positions, (start - 1).clamp(min=0))
    return torch.stack([in_text, (positions - start + 1).clamp(min=0)])


__all__ = [
    "AdapterRows",
    "ForwardContext",
    "KeyValueStore",
    "RecurrentStep",
    "SharedRows",
    "VirtualRows",
    "block_position_rows",
]
