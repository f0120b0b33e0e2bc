"""Paged attention of a decoding step in Triton: one query per sequence.

A sequence's keys are divided into splits of a fixed number of positions, each computed by a
separate program, so that a long context fills the GPU; a second kernel merges them
(Flash-Decoding). The splits depend on positions only, never on the batch, so the result is
batch-invariant.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from easyllm.ops.kernels.structs import has_contiguous_heads

SPLIT = 256
"""Number of positions in a split."""
KEYS = 64
"""Keys that a program processes at a time."""
_PRODUCTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MIN_DOT_ROWS = 16
"""Minimum rows of `tl.dot`; the query heads of a KV head fill them."""


@triton.jit
def _split_kernel(
    q,
    keys,
    values,
    table,
    lengths,
    partial,
    partial_lse,
    q_stride,
    table_width,
    page_size,
    kv_heads,
    window,
    scale,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    KEYS: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits = tl.num_programs(2)
    length = tl.load(lengths + row)
    first = split * SPLIT
    if first >= length:
        return
    end = tl.minimum(first + SPLIT, length)
    seen = first
    if window > 0:
        seen = tl.maximum(first, length - window)
    group, dims, offsets = tl.arange(0, ROWS), tl.arange(0, PADDED), tl.arange(0, KEYS)
    heads = kv_head * GROUP + group
    head_ok, dim_ok = group < GROUP, dims < DIM
    both_ok = head_ok[:, None] & dim_ok[None, :]
    query = tl.load(
        q + row.to(tl.int64) * q_stride + heads[:, None] * DIM + dims[None, :],
        mask=both_ok,
        other=0.0,
    ).to(PRODUCTS)
    most = tl.full([ROWS], -float("inf"), dtype=tl.float32)
    mass = tl.zeros([ROWS], dtype=tl.float32)
    out = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    for start in range(seen // KEYS * KEYS, end, KEYS):
        position = start + offsets
        ok = (position >= seen) & (position < end)
        page = tl.load(
            table + row.to(tl.int64) * table_width + position // page_size, mask=ok, other=0
        )
        at = ((page.to(tl.int64) * kv_heads + kv_head) * page_size + position % page_size) * DIM
        at = at[:, None] + dims[None, :]
        key = tl.load(keys + at, mask=ok[:, None] & dim_ok[None, :], other=0.0)
        score = tl.dot(query, tl.trans(key.to(PRODUCTS)), input_precision="ieee") * scale
        score = tl.where(ok[None, :], score, -float("inf"))
        higher = tl.maximum(most, tl.max(score, axis=1))
        weight = tl.exp(score - higher[:, None])
        kept = tl.exp(most - higher)
        mass = mass * kept + tl.sum(weight, axis=1)
        value = tl.load(values + at, mask=ok[:, None] & dim_ok[None, :], other=0.0)
        value = value.to(PRODUCTS)
        out = out * kept[:, None] + tl.dot(weight.to(PRODUCTS), value, input_precision="ieee")
        most = higher
    seen_any = mass > 0
    mass = tl.where(seen_any, mass, 1.0)
    lse = tl.where(seen_any, most + tl.log(mass), -float("inf"))
    out = out / mass[:, None]
    place = (row.to(tl.int64) * kv_heads * GROUP + heads) * num_splits + split
    tl.store(partial_lse + place, lse, mask=head_ok)
    tl.store(partial + place[:, None] * DIM + dims[None, :], out, mask=both_ok)


@triton.jit
def _merge_kernel(
    partial,
    partial_lse,
    lengths,
    out,
    num_splits,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    dims = tl.arange(0, PADDED)
    dim_ok = dims < DIM
    place = (row.to(tl.int64) * heads + head) * num_splits
    most = -float("inf")
    mass = 0.0
    total = tl.zeros([PADDED], dtype=tl.float32)
    for split in range(tl.cdiv(tl.load(lengths + row), SPLIT)):
        lse = tl.load(partial_lse + place + split)
        higher = tl.maximum(most, lse)
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        kept, weight = tl.exp(most - safe), tl.exp(lse - safe)
        part = tl.load(partial + (place + split) * DIM + dims, mask=dim_ok, other=0.0)
        total = total * kept + part * weight
        mass = mass * kept + weight
        most = higher
    at = (row.to(tl.int64) * heads + head) * DIM + dims
    tl.store(out + at, (total / mass).to(out.dtype.element_ty), mask=dim_ok)


def decode_attention(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    key_lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Computes attention of each sequence's newest token over all its keys.

    Args:
        q: [S, H, d], fp32, bf16 or fp16.
        key_pages, value_pages: [P, K, page_size, d] contiguous; H % K == 0.
        page_table: [S, max_pages] int32 contiguous.
        key_lengths: [S] int32, at least 1; keys beyond them are not read.
        scale: factor of the scores.
        window: number of most recent keys that are visible; None for all.

    Returns:
        [S, H, d], dtype of `q`.
    """
    if not has_contiguous_heads(q):
        q = q.contiguous()
    rows, heads, dim = q.shape
    kv_heads, page_size = key_pages.shape[1], key_pages.shape[2]
    splits = triton.cdiv(page_table.shape[1] * page_size, SPLIT)
    partial = torch.empty(rows, heads, splits, dim, device=q.device)
    lse = torch.empty(rows, heads, splits, device=q.device)
    out = torch.empty(rows, heads, dim, dtype=q.dtype, device=q.device)
    group, padded = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    _split_kernel[(rows, kv_heads, splits)](
        *(q, key_pages, value_pages, page_table, key_lengths, partial, lse),
        *(q.stride(0), page_table.shape[1], page_size, kv_heads, window or 0, scale),
        GROUP=group,
        ROWS=max(MIN_DOT_ROWS, triton.next_power_of_2(group)),
        DIM=dim,
        PADDED=padded,
        SPLIT=SPLIT,
        KEYS=KEYS,
        PRODUCTS=_PRODUCTS[q.dtype] if q.is_cuda else tl.float32,  # no bf16 in the interpreter
    )
    _merge_kernel[(rows, heads)](
        partial, lse, key_lengths, out, splits, DIM=dim, PADDED=padded, SPLIT=SPLIT
    )
    return out
