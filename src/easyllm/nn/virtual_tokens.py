"""Virtual tokens: learned rows in front of every sequence, which prompt methods train (arXiv 2104.08691, 2101.00190).

A virtual token takes a place in its sequence: a position, a row of every layer, keys and values. Number i of them has the id
V + i, so that the engine's pages, prefix caching and preemption know it like any other. Where whole sequences pass the
decoder, it puts them in front itself and gives the real tokens' rows back.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from easyllm.nn.context import ForwardContext


class ModelAdapter(Protocol):
    """What a method that acts on the model as a whole gives.

    Attributes:
        num_virtual: virtual tokens in front of each sequence.
    """

    num_virtual: int

    def vectors(self) -> Tensor | None:
        """[n, D] what enters the first layer for each virtual token; None leaves the rows zero."""

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values [n, K, d] each that a layer has for the virtual tokens; None keeps its own."""


@dataclass(frozen=True, slots=True)
class VirtualTokens:
    """The virtual tokens of a pass.

    Attributes:
        numbers: [T] int64, which virtual token a row is; -1 for a real token.
        source: what they stand for.
    """

    numbers: Tensor
    source: ModelAdapter

    def fill(self, rows: Tensor, values: Tensor) -> Tensor:
        """`rows: [T, ...]` with those of virtual tokens replaced by theirs of `values: [n, ...]`."""
        chosen = values[self.numbers.clamp(min=0)].to(rows.dtype)
        shape = (-1, *(1,) * (rows.ndim - 1))
        return torch.where((self.numbers >= 0).view(shape), chosen, rows)

    def embed(self, x: Tensor) -> Tensor:
        """Embedded tokens [T, D] with the virtual ones' vectors in their places."""
        vectors = self.source.vectors()
        return self.fill(x, x.new_zeros(self.source.num_virtual, 1) if vectors is None else vectors)

    def keys_values(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[T, K, d]` of a layer with those of virtual tokens in their places."""
        own = self.source.keys_values(layer)
        return (k, v) if own is None else (self.fill(k, own[0]), self.fill(v, own[1]))


def in_front(
    token_ids: Tensor, context: ForwardContext, source: ModelAdapter, vocab_size: int
) -> tuple[Tensor, ForwardContext, Tensor | None]:
    """A pass with its virtual tokens.

    Args:
        token_ids: [T]; with a store, virtual tokens are among them as V + i.

    Returns:
        Ids [T'] of real tokens (0 in the places of virtual ones), the context of all T' rows, and the rows [T] of the
        real tokens; None where all T rows were asked for.
    """
    if context.store is not None:
        numbers = torch.where(token_ids >= vocab_size, token_ids - vocab_size, -1)
        ids = token_ids.masked_fill(numbers >= 0, 0)
        return ids, replace(context, virtual=VirtualTokens(numbers, source)), None
    n, device = source.num_virtual, token_ids.device
    virtual = torch.arange(n, device=device)
    which, tokens, positions = list[Tensor](), list[Tensor](), list[Tensor]()
    sequences = zip(
        token_ids.split(context.lengths), context.positions.split(context.lengths), strict=True
    )
    for real, places in sequences:
        which += [virtual, real.new_full((len(real),), -1)]
        tokens += [torch.zeros_like(virtual), real]
        positions += [virtual, places + n]
    of_row = torch.cat(which)
    prefixes = context.prefix_lengths
    longer = ForwardContext(
        positions=torch.cat(positions),
        lengths=tuple(length + n for length in context.lengths),
        prefix_lengths=None if prefixes is None else tuple(p + n for p in prefixes),
        deterministic=context.deterministic,
        virtual=VirtualTokens(of_row, source),
        routing=context.routing,
    )
    return torch.cat(tokens), longer, (of_row < 0).nonzero().squeeze(1)


__all__ = ["ModelAdapter", "VirtualTokens", "in_front"]
