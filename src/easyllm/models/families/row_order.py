"""Orders of the rows of query and key projections, by which positions rotate adjacent rows.

Queries and keys that are permuted alike have the same dot products, so a family whose checkpoints
are made for another order of rotated pairs becomes one with ordinary half-split RoPE when its rows
are permuted on loading; fast paths for RoPE then apply to it, too.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from easyllm.checkpoint.keymap import Converted, Fused

Reorder = Callable[[Tensor], Tensor]


def separated_pairs(num_heads: int, rotary_dim: int) -> tuple[Reorder, Reorder]:
    """Returns the conversion from interleaved pairs (2i, 2i+1) to halves (i, i + r/2), and back.

    Args:
        num_heads: number of heads of the projection.
        rotary_dim: r, the number of first rows of each head that are rotated.
    """
    order = torch.arange(rotary_dim).view(-1, 2).T.flatten()
    return _moves(order, num_heads)


def joined_halves(num_heads: int, head_dim: int) -> tuple[Reorder, Reorder]:
    """Returns the conversion of two half-split rotations, side by side, to a single one, and back.

    The two halves of a head rotate by different positions (ChatGLM-6B); pairs of both become pairs
    (i, i + d/2) of the head.
    """
    order = torch.arange(head_dim).view(2, 2, -1).transpose(0, 1).flatten()
    return _moves(order, num_heads)


def reordered_qkv(rule: Fused, q: tuple[Reorder, Reorder], k: tuple[Reorder, Reorder]) -> Converted:
    """Returns a rule for fused queries, keys and values whose queries and keys are reordered."""
    return Converted(rule, (q[0], k[0], None), (q[1], k[1], None))


def _moves(order: Tensor, num_heads: int) -> tuple[Reorder, Reorder]:
    return (
        partial(_moved, order=order, num_heads=num_heads),
        partial(_moved, order=order.argsort(), num_heads=num_heads),
    )


def _moved(rows: Tensor, *, order: Tensor, num_heads: int) -> Tensor:
    """Returns `rows: [heads · d, ...]` with the first rows of each head in another order."""
    heads = rows.unflatten(0, (num_heads, -1))
    first = heads[:, : len(order)].index_select(1, order.to(rows.device))
    return torch.cat([first, heads[:, len(order) :]], dim=1).flatten(0, 1)


__all__ = ["joined_halves", "reordered_qkv", "separated_pairs"]
