"""Rotary position embedding (RoPE), half-split layout: pair i is (x_i, x_{i+d/2}).

    (a, b) → (a cos - b sin, b cos + a sin)                               (arXiv 2104.09864, eq. 34)

The backward pass is the rotation by the opposite angle, so only the tables are saved.
"""

import torch
from torch import Tensor

from easyllm.ops.autograd import Context
from easyllm.ops.gpu import triton_unsupported_reason
from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.structs import DTYPE_CODES, Rotary, address, has_contiguous_heads


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Returns `x` rotated by position; differentiable.

    Args:
        x: [T, heads, d].
        cos, sin: cosines and sines of the angles, [T, d/2] fp32.
        interleaved: rotate the pairs (2i, 2i+1) of the paper instead of (i, i + d/2).

    Returns:
        [T, heads, d], dtype of `x`.
    """
    if interleaved:
        return rotate_interleaved(x, cos[:, None, :], sin[:, None, :])
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Rotary.apply(x, cos, sin)
        return out
    return _rotate(x, cos, sin, 1.0)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (i, i + d/2) of the last dimension; `cos, sin` broadcast against its halves."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (2i, 2i+1) of the last dimension; `cos, sin` broadcast against the pairs."""
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def reference_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Reference for `apply_rotary` (half-split): fp32 products, rounded once at the end."""
    return rotate_pairs(x, cos[:, None, :], sin[:, None, :])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    if triton_unsupported_reason(x, cos) is None:
        from easyllm.ops.gpu import rotary

        return rotary.rotate(x, cos, sin, sign)
    kernels = kernels_for(x, cos) if x.dtype == torch.bfloat16 else None
    if kernels is None or not has_contiguous_heads(x):
        return reference_rotary(x, cos, sin if sign > 0 else -sin)
    out = torch.empty(x.shape, dtype=x.dtype)
    kernels.rotary(
        Rotary(
            x=address(x),
            y=address(out),
            cosine=address(cos),
            sine=address(sin),
            x_stride=x.stride(0),
            rows=x.shape[0],
            heads=x.shape[1],
            half=x.shape[2] // 2,
            dtype=DTYPE_CODES[x.dtype],
            sign=sign,
        )
    )
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0].contiguous(), cos, sin, -1.0), None, None
