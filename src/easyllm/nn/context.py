"""What every part of a forward pass is told of the batch; an argument, never a global, and never a flag on a module.

Two engines can share one model: each hands its own context down, and nothing of the model changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from easyllm.ops.attention import AttentionRule


class KeyValueStore(Protocol):
    """Where keys, values and states live between forward passes; the engine's cache implements it."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rule: AttentionRule,
        prefix_lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Stores `k`, `v: [T, K, d]` for `layer`; returns the outputs of `q: [T, H, d]`."""

    def recur(self, layer: int, step: "RecurrentStep", *inputs: Tensor) -> Tensor:
        """Runs `step` on each sequence's inputs from the state it left before."""


class RecurrentStep(Protocol):
    """One sequence's tokens and its state (None at first) → output and new state."""

    def __call__(self, *inputs: Tensor, state: Any) -> tuple[Tensor, Any]: ...


class VirtualRows(Protocol):
    """The virtual tokens of a pass (`nn/virtual_tokens`)."""

    def keys_values(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[T, K, d]` of a layer with those of virtual tokens in their places."""


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Which adapter each row of a pass uses.

    Attributes:
        names: of the adapters; `""` is the base alone.
        index: [T] int64, the place of each row's among them.
    """

    names: tuple[str, ...]
    index: Tensor

    @classmethod
    def of_sequences(
        cls, names: Sequence[str], lengths: Sequence[int], *, device: torch.device | str = "cpu"
    ) -> "AdapterRows":
        """Each sequence's adapter for all of its rows."""
        known = tuple(dict.fromkeys(names))
        numbers = torch.tensor([known.index(name) for name in names], dtype=torch.int64)
        return cls(known, numbers.repeat_interleave(torch.tensor(lengths)).to(device))

    def rows(self) -> list[tuple[str, Tensor | None]]:
        """The rows of each adapter in use; None where they are all of them."""
        if len(self.names) == 1:
            return [(self.names[0], None)]
        found = [
            (name, (self.index == i).nonzero().squeeze(1)) for i, name in enumerate(self.names)
        ]
        return [(name, rows) for name, rows in found if len(rows)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardContext:
    """Everything a forward pass needs to know of a batch besides its token ids.

    Attributes:
        positions: [T] int64, the position of each token in its own sequence.
        lengths: tokens of each sequence in this forward pass; they sum to T.
        prefix_lengths: first tokens of each sequence that see each other both ways (UniLM's mask); with a store,
            a prefix lies whole in the pass that begins its sequence.
        store: where earlier keys and values live; None when every key is in this forward pass.
        deterministic: batch-invariant: a row's bits do not depend on the rows computed with it (`nn/deterministic`).
        adapters: the adapter of each row, where several are held at once; None uses a layer's own for every row.
        virtual: which rows are virtual tokens of a model-level adapter; set by the decoder.
        routing: when a list, each layer with experts appends its `Routing` to it.
        memo: values computed once a forward pass and shared by the layers.
    """

    positions: Tensor
    lengths: tuple[int, ...]
    prefix_lengths: tuple[int, ...] | None = None
    store: KeyValueStore | None = None
    deterministic: bool = False
    adapters: AdapterRows | None = None
    virtual: VirtualRows | None = None
    routing: list[Any] | None = None
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
        deterministic: bool = False,
        adapters: AdapterRows | None = None,
        routing: list[Any] | None = None,
    ) -> "ForwardContext":
        """The context of sequences laid end to end; `offsets` are their first positions."""
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
            deterministic=deterministic,
            adapters=adapters,
            routing=routing,
        )

    @property
    def base_only(self) -> bool:
        """Whether every row uses the base without an adapter."""
        return self.adapters is not None and self.adapters.names == ("",)

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """The value of `compute()`, computed by the first layer that asks for `key`."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def of_rows(self, rows: Tensor) -> "ForwardContext":
        """The context of chosen rows, for what works row by row: an expert, the head."""
        if self.adapters is None:
            return self
        return replace(self, adapters=AdapterRows(self.adapters.names, self.adapters.index[rows]))


__all__ = ["AdapterRows", "ForwardContext", "KeyValueStore", "RecurrentStep", "VirtualRows"]
