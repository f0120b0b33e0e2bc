"""RoPE in Triton, half-split layout; the backward pass is the rotation by the opposite angle."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""Pairs that a program rotates."""


@triton.jit
def _rotate_kernel(
    x,
    out,
    cosine,
    sine,
    sign,
    num_rows,
    heads,
    half,
    token_stride,
    head_stride,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # one head of one token each
    pairs = tl.arange(0, HALF)
    ok = (rows < num_rows)[:, None] & (pairs < half)[None, :]
    token, head = (rows // heads).to(tl.int64), rows % heads
    source = x + (token * token_stride + head * head_stride)[:, None] + pairs[None, :]
    angle = token[:, None] * half + pairs[None, :]
    a = tl.load(source, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=ok, other=0.0).to(tl.float32)
    c = tl.load(cosine + angle, mask=ok, other=0.0).to(tl.float32)
    s = tl.load(sine + angle, mask=ok, other=0.0).to(tl.float32) * sign
    target = out + rows.to(tl.int64)[:, None] * (2 * half) + pairs[None, :]
    tl.store(target, (a * c - b * s).to(out.dtype.element_ty), mask=ok)
    tl.store(target + half, (b * c + a * s).to(out.dtype.element_ty), mask=ok)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Returns `x` rotated by `sign` times the angles.

    Args:
        x: [T, heads, d].
        cos, sin: cosines and sines of the angles, [T, d/2].
        sign: 1.0, or -1.0 for the backward pass.

    Returns:
        [T, heads, d] contiguous, dtype of `x`.
    """
    if x.stride(2) != 1:
        x = x.contiguous()
    tokens, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = triton.next_power_of_2(dim // 2)
    rows = max(1, TILE // half)
    _rotate_kernel[(triton.cdiv(tokens * heads, rows),)](
        *(x, out, cos.contiguous(), sin.contiguous(), sign, tokens * heads, heads, dim // 2),
        *(x.stride(0), x.stride(1)),
        ROWS=rows,
        HALF=half,
    )
    return out
