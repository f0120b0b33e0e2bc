"""RMS normalisation with a backward pass that keeps one number a row beside its input.

y = x / r ⊙ w,   r = √(mean(x²) + eps)                                  (arXiv 1910.07467, eq. 4)
∂x = (g - x̂ · mean(g ⊙ x̂)) / r,   g = ∂y ⊙ w,   x̂ = x / r;   ∂w = Σ_rows ∂y ⊙ x̂
"""

from typing import Any

import torch
from torch import Tensor

from easyllm.ops.gpu import gpu_ready
from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.build import DTYPE_CODES


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x: [..., D]` normalised in fp32, scaled by `weight: [D]`; shape of `x`, dtype of `weight`."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _RMSNorm.apply(x, weight, eps)
        return out
    return _forward(x, weight, eps)[0]


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The equation as written, in fp32 (fp64 for an fp64 `x`), rounded once at the end."""
    wide = x if x.dtype == torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal * weight).to(weight.dtype)


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The output, and 1/r of each row."""
    if gpu_ready(x, weight):
        from easyllm.ops.gpu import norm

        return norm.rms_norm_forward(x, weight, eps)
    kernels = kernels_for(x, weight) if x.dtype == torch.float32 and x.is_contiguous() else None
    if kernels is None:
        wide = x if x.dtype == torch.float64 else x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * inverse).mul_(weight).to(weight.dtype), inverse
    y = torch.empty_like(x, dtype=weight.dtype)
    inverse = torch.empty(*x.shape[:-1], 1)
    w = weight.detach().float().contiguous()
    kernels.rms_norm_forward(
        x.data_ptr(),
        w.data_ptr(),
        y.data_ptr(),
        DTYPE_CODES[y.dtype],
        inverse.data_ptr(),
        inverse.numel(),
        x.shape[-1],
        eps,
    )
    return y, inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        (grad,) = grads
        if gpu_ready(grad, x, weight):
            from easyllm.ops.gpu import norm

            wanted = ctx.needs_input_grad[1]
            return *norm.rms_norm_backward(grad, x, weight, inverse, with_weight=wanted), None
        kernels = kernels_for(x, weight, grad) if x.dtype == torch.float32 else None
        if kernels is None:
            return *_backward(grad, x, weight, inverse), None
        grad, x, w = grad.contiguous(), x.contiguous(), weight.float().contiguous()
        grad_x = torch.empty_like(x)
        grad_w = torch.empty_like(w) if ctx.needs_input_grad[1] else None
        kernels.rms_norm_backward(
            grad.data_ptr(),
            DTYPE_CODES[grad.dtype],
            x.data_ptr(),
            w.data_ptr(),
            inverse.data_ptr(),
            grad_x.data_ptr(),
            None if grad_w is None else grad_w.data_ptr(),
            inverse.numel(),
            x.shape[-1],
        )
        return grad_x, None if grad_w is None else grad_w.to(weight.dtype), None


def _backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad.to(inverse.dtype)
    normal = x.to(inverse.dtype) * inverse
    grad_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
    grad = grad * weight
    scale = (grad * normal).mean(-1, keepdim=True)
    return grad.sub_(normal.mul_(scale)).mul_(inverse).to(x.dtype), grad_weight
