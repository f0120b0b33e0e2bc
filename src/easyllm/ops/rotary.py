"""Rotation of queries and keys by their positions, half-split layout: pair i is (x_i, x_{i+d/2}).

    (a, b) → (a cos - b sin, b cos + a sin)                               (arXiv 2104.09864, eq. 34)

The backward pass is the rotation by the opposite angle, so nothing but the tables is kept.
"""

from typing import Any

import torch
from torch import Tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x: [T, heads, d]` rotated by the angles whose cosines and sines are `cos, sin: [T, d/2]`."""
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Rotary.apply(x, cos, sin)
        return out
    return _rotate(x, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    out[..., :half] = first * cos - second * sin  # fp32 products, rounded once on the way in
    out[..., half:] = second * cos + first * sin
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None
