"""Batch-invariant operations: a row's result is bitwise independent of the other rows in the batch.

A GEMM library chooses its kernel, and so its summation order, by the number of rows: `F.linear`
gives a single row different last bits than the same row in a batch of 64. Generated text would then
depend on the other requests being served, and the engine's log-probabilities would differ from
those of the training forward pass. Here every GEMM has one fixed shape, and attention sums over
keys in one fixed order. Row-wise operations (norms, rotations, gates, quantized linears) are
batch-invariant already.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.ops.attention import attention
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.autograd import Context
from easyllm.ops.paged_attention import new_pages, paged_attention

TILE_ROWS = 32
PAGE_SIZE = 64


def tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x Wᵀ + b, computed in tiles of 32 rows; the last tile is padded with zeros.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None.

    Returns:
        [..., N]; batch-invariant: each row depends only on its row of `x` and on the weight.
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
    """Computes `packed_attention`, with the gradient of `ops.attention.attention`.

    Both are the same function up to rounding.
    """
    with torch.no_grad():
        exact = packed_attention(q, k, v, rule, lengths)
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return exact
    out: Tensor = _WithValue.apply(attention(q, k, v, rule, lengths), exact)
    return out


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, lengths: tuple[int, ...]
) -> Tensor:
    """Computes `ops.attention.attention` bitwise identically to decoding from a paged KV cache.

    Args:
        q: [T, H, d]; k, v: [T, K, d] of the same tokens; sequences are packed end to end.
        rule: scale, mask and position terms.
        lengths: number of tokens of each sequence, summing to T.

    Returns:
        [T, H, d], dtype of `q`. Rules that the kernel of `paged_attention` does not support use its
        reference, which is not guaranteed to be batch-invariant.
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
        assert isinstance(store, Tensor), "pages of a torch dtype are a tensor"
        for start, count, part in zip(starts, counts, x.split(lengths), strict=False):
            filled = F.pad(part, (0, 0, 0, 0, 0, count * PAGE_SIZE - len(part)))
            by_page = filled.view(count, PAGE_SIZE, *part.shape[1:])
            store[start : start + count] = by_page.transpose(1, 2)
        pages.append(store)
    return paged_attention(q, pages[0], pages[1], table, lengths, lengths, rule)


class _WithValue(torch.autograd.Function):
    """Returns the second tensor; the gradient flows to the first."""

    @staticmethod
    def forward(_ctx: Context, _differentiable: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(_ctx: Context, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
