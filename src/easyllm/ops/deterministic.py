"""Operations whose result for a row has the same bits whatever other rows are computed with it.

A matrix product picks another kernel, and so another order of its sums, for another number of rows: `F.linear` gives a
row alone other last bits than the row among 64. Served text would then hang on what else is being served, and a
log-probability of the engine would differ from that of the training forward. Here every product has one shape, and
attention one order of keys. What works row by row anyway (norms, rotations, gates, quantized linears) needs nothing.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.ops.attention import AttentionRule, attention
from easyllm.ops.paged_attention import new_pages, paged_attention

TILE_ROWS = 32
PAGE_SIZE = 64


def tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b over tiles of 32 rows, the last one filled up with zeros.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None.

    Returns:
        [..., N]; a row's bits depend on that row and the weight alone.
    """
    rows = x.reshape(-1, x.shape[-1])
    missing = -len(rows) % TILE_ROWS
    tiles = F.pad(rows, (0, 0, 0, missing)).split(TILE_ROWS)
    parts = [F.linear(tile, weight, bias) for tile in tiles]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out[: len(rows)].view(*x.shape[:-1], weight.shape[0])


def deterministic_attention(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, lengths: tuple[int, ...]
) -> Tensor:
    """`packed_attention`, with the gradient of `ops.attention.attention` (of the same function, within rounding)."""
    with torch.no_grad():
        exact = packed_attention(q, k, v, rule, lengths)
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return exact
    out: Tensor = _WithValue.apply(attention(q, k, v, rule, lengths), exact)
    return out


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, lengths: tuple[int, ...]
) -> Tensor:
    """`ops.attention.attention` by the kernel of `paged_attention`: the bits that decoding from a cache gives.

    Args:
        q: [T, H, d]; k, v: [T, K, d] of the same tokens, sequences end to end.
        lengths: tokens of each sequence; they sum to T.

    Returns:
        [T, H, d], dtype of `q`. Rules the kernel does not serve get the reference, which promises no bits.
    """
    counts = [-(-length // PAGE_SIZE) for length in lengths]
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    widest = max(counts, default=0)
    numbers = torch.arange(widest, dtype=torch.int32)
    table = torch.stack([numbers + start for start in starts[:-1]]) if lengths else numbers[None]
    shape = (starts[-1], k.shape[1], PAGE_SIZE, k.shape[2])
    pages = []
    for x in (k, v):
        store = new_pages(shape, x.dtype)
        assert isinstance(store, Tensor), "pages of a torch dtype"
        for start, count, part in zip(starts, counts, x.split(lengths), strict=False):
            filled = F.pad(part, (0, 0, 0, 0, 0, count * PAGE_SIZE - len(part)))
            by_page = filled.view(count, PAGE_SIZE, *part.shape[1:])
            store[start : start + count] = by_page.transpose(1, 2)
        pages.append(store)
    return paged_attention(q, pages[0], pages[1], table, lengths, lengths, rule)


class _WithValue(torch.autograd.Function):
    """The second tensor's value with the first one's gradient."""

    @staticmethod
    def forward(_ctx: Any, _differentiable: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
