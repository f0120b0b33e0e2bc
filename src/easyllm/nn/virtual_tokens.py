"""Virtual tokens: learned rows that prompt tuning and prefix tuning prepend to every sequence.

See arXiv 2104.08691 and 2101.00190. A virtual token occupies a slot in its sequence: a position, a
row in every layer, keys and values. Virtual token i has the id V + i, so that the engine's paged
attention, prefix caching and preemption treat it like any other token. For complete sequences
(without a KV cache) the decoder prepends the virtual tokens itself and returns only the rows of the
real tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from easyllm.nn.context import ForwardContext

KeysValues: TypeAlias = tuple[Tensor, Tensor]


class ModelAdapter(Protocol):
    """An adapter that acts on the model rather than on single layers.

    Its methods are called once per forward pass, so they may compute what they return.

    Attributes:
        num_virtual: number of virtual tokens prepended to each sequence.
    """

    num_virtual: int

    def vectors(self) -> Tensor | None:
        """Returns the input of the first layer for the virtual tokens, [n, D]; None means zeros.

        They replace scaled embeddings: a model with an `embedding_scale` does not scale them.
        """

    def keys_values(self) -> Sequence[KeysValues | None]:
        """Returns every layer's keys and values of the virtual tokens, [n, K, d] each.

        Keys are used as they are, without a norm or a rotation. None keeps the keys and values that
        a layer computes, and an empty sequence those of all layers.
        """


class VirtualTokens:
    """The virtual tokens of a forward pass.

    Args:
        numbers: [T] int64, the number of the virtual token in each row; -1 for a real token.
        source: the adapter that defines their vectors, keys and values.
    """

    def __init__(self, numbers: Tensor, source: ModelAdapter) -> None:
        self._is_virtual, self._index = numbers >= 0, numbers.clamp(min=0)
        self._num_virtual = source.num_virtual
        self._vectors, self._keys_values = source.vectors(), source.keys_values()

    def fill(self, rows: Tensor, values: Tensor) -> Tensor:
        """Returns `rows: [T, ...]` with those of virtual tokens taken from `values: [n, ...]`."""
        # cast after the gather, so that the gradient of `values` is summed in its own dtype
        chosen = values[self._index].to(rows.dtype)
        shape = (-1, *(1,) * (rows.ndim - 1))
        return torch.where(self._is_virtual.view(shape), chosen, rows)

    def embed(self, x: Tensor) -> Tensor:
        """Returns the embedded tokens [T, D] with the rows of virtual tokens replaced."""
        if self._vectors is None:
            return self.fill(x, x.new_zeros(self._num_virtual, 1))
        return self.fill(x, self._vectors)

    def keys_values(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values [T, K, d] with the rows of virtual tokens replaced."""
        own = self._keys_values[layer] if self._keys_values else None
        return (k, v) if own is None else (self.fill(k, own[0]), self.fill(v, own[1]))


def prepend_virtual_tokens(
    token_ids: Tensor, context: ForwardContext, source: ModelAdapter, vocab_size: int
) -> tuple[Tensor, ForwardContext, Tensor | None]:
    """Adds the virtual tokens to a forward pass.

    Args:
        token_ids: [T]; with a store, they already include the virtual tokens as V + i.
        context: the context of these tokens.
        source: the adapter with the virtual tokens.
        vocab_size: V.

    Returns:
        Token ids [T'] (0 for virtual tokens), the context of all T' rows, and the indices [T] of
        the real tokens' rows, or None with a store, when all rows are returned.
    """
    if context.store is not None:
        numbers = torch.where(token_ids >= vocab_size, token_ids - vocab_size, -1)
        # decoding steps have no virtual tokens; on a GPU, finding out would synchronise with it
        if numbers.device.type == "cpu" and not bool((numbers >= 0).any()):
            return token_ids, context, None
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
        position_rows=_shifted(context, n),
        deterministic=context.deterministic,
        virtual=VirtualTokens(of_row, source),
        routing=context.routing,
    )
    return torch.cat(tokens), longer, (of_row < 0).nonzero().squeeze(1)


def _shifted(context: ForwardContext, count: int) -> Tensor | None:
    """Returns the position rows of sequences with `count` virtual tokens in front of each."""
    rows = context.position_rows
    if rows is None:
        return None
    virtual = torch.arange(count, device=rows.device)
    virtual = torch.stack([virtual, torch.zeros_like(virtual)])
    moved = rows + rows.new_tensor([[count], [0]])
    parts = [part for each in moved.split(context.lengths, dim=1) for part in (virtual, each)]
    return torch.cat(parts, dim=1)


__all__ = ["KeysValues", "ModelAdapter", "VirtualTokens", "prepend_virtual_tokens"]
