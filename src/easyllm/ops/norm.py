"""RMS normalisation with a backward pass that keeps one number a row beside its input.

y = x / r ⊙ w,   r = √(mean(x²) + eps)                                  (arXiv 1910.07467, eq. 4)
∂x = (g - x̂ · mean(g ⊙ x̂)) / r,   g = ∂y ⊙ w,   x̂ = x / r;   ∂w = Σ_rows ∂y ⊙ x̂
"""

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x: [..., D]` normalised in fp32, scaled by `weight: [D]`; shape of `x`, dtype of `weight`."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _RMSNorm.apply(x, weight, eps)
        return out
    return reference_rms_norm(x, weight, eps)


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The equation as written, in fp32 (fp64 for an fp64 `x`), rounded once at the end."""
    wide = x if x.dtype == torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal * weight).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        grad = grads[0].to(inverse.dtype)
        normal = x.to(inverse.dtype) * inverse
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        grad = grad * weight
        scale = (grad * normal).mean(-1, keepdim=True)
        return grad.sub_(normal.mul_(scale)).mul_(inverse).to(x.dtype), grad_weight, None
