"""RMS normalization (RMSNorm), alone and fused with the residual addition before it.

The backward pass needs only the input and one saved number per row. The fused form returns the sum,
which continues as the residual stream, in addition to its norm.

y = x / r ⊙ w,   r = √(mean(x²) + eps)                                  (arXiv 1910.07467, eq. 4)
∂x = (g - x̂ · mean(g ⊙ x̂)) / r,   g = ∂y ⊙ w,   x̂ = x / r;   ∂w = Σ_rows ∂y ⊙ x̂
"""

import torch
from torch import Tensor

from easyllm.ops.autograd import Context
from easyllm.ops.gpu import triton_unsupported_reason
from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.structs import DTYPE_CODES, RmsNormBackward, RmsNormForward, address


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns `x` normalized by its root mean square and scaled by `weight`.

    Args:
        x: [..., D]; weight: [D]; eps: added to the mean square.

    Returns:
        [..., D], dtype of `weight`; computed in fp32.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _RMSNorm.apply(x, weight, eps)
        return out
    return _forward(x, None, weight, eps)[1]


def add_rms_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns x + added and its `rms_norm`, computed in one pass over memory.

    The backward pass sums the gradients of both outputs in one pass as well.

    Args:
        x: [..., D], at least fp32.
        added: [..., D] of any dtype, or None to normalize `x` itself.
        weight: [D]; eps: added to the mean square.

    Returns:
        The sum, [..., D] in the dtype of `x`, and its norm, [..., D] in the dtype of `weight`.
    """
    tensors = (x, weight) if added is None else (x, weight, added)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        found: tuple[Tensor, Tensor] = _AddRMSNorm.apply(x, added, weight, eps)
        return found
    total, out, _ = _forward(x, added, weight, eps)
    return total, out


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Reference for `rms_norm`: fp32 (fp64 for an fp64 `x`), rounded once at the end."""
    wide = x if x.dtype == torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal * weight).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        _, y, inverse = _forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        grad_x, _, grad_weight = _backward(
            grads[0], None, x, weight, inverse, None, with_weight=ctx.needs_input_grad[1]
        )
        return grad_x, grad_weight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, added: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, y, inverse = _forward(x, added, weight, eps)
        ctx.save_for_backward(total, weight, inverse)
        ctx.added_dtype = added.dtype if added is not None and ctx.needs_input_grad[1] else None
        return total, y

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        (grad_sum, grad), (x, weight, inverse) = grads, ctx.saved_tensors
        grad_x, grad_added, grad_weight = _backward(
            *(grad, grad_sum, x, weight, inverse, ctx.added_dtype),
            with_weight=ctx.needs_input_grad[2],
        )
        return grad_x, grad_added, grad_weight, None


def _forward(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the sum, its norm, and 1/r of each row."""
    tensors = (x, weight) if added is None else (x, weight, added)
    if triton_unsupported_reason(*tensors) is None:
        from easyllm.ops.gpu import norm

        return norm.rms_norm_forward(x, added, weight, eps)
    fits = x.dtype == torch.float32 or added is None  # a sum has the dtype of x
    fits = fits and all(t.is_contiguous() for t in tensors)
    kernels = kernels_for(*tensors) if fits else None
    if kernels is None:
        total = x if added is None else x + added
        wide = total if total.dtype == torch.float64 else total.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return total, (wide * inverse).mul_(weight).to(weight.dtype), inverse
    x = x.float()
    total = x if added is None else torch.empty_like(x)
    y = torch.empty_like(x, dtype=weight.dtype)
    inverse = torch.empty(*x.shape[:-1], 1)
    w = weight.detach().float().contiguous()
    kernels.rms_norm_forward(
        RmsNormForward(
            x=address(x),
            added=address(added),
            sum=address(total),
            weight=address(w),
            y=address(y),
            inverse=address(inverse),
            added_dtype=0 if added is None else DTYPE_CODES[added.dtype],
            y_dtype=DTYPE_CODES[y.dtype],
            rows=inverse.numel(),
            width=x.shape[-1],
            eps=eps,
        )
    )
    return total, y, inverse


def _backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    added_dtype: torch.dtype | None,
    *,
    with_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the gradients of `x`, which is the sum, of the added tensor, and of the weight."""
    tensors = (grad, x, weight) if grad_sum is None else (grad, x, weight, grad_sum)
    if triton_unsupported_reason(*tensors) is None:
        from easyllm.ops.gpu import norm

        return norm.rms_norm_backward(
            grad, grad_sum, x, weight, inverse, added_dtype, with_weight=with_weight
        )
    wide_sum = grad_sum is None or grad_sum.dtype == torch.float32
    fits = x.dtype == torch.float32 and wide_sum and added_dtype in (None, *DTYPE_CODES)
    kernels = kernels_for(*tensors) if fits else None
    if kernels is None:
        return _plain_backward(grad, grad_sum, x, weight, inverse, added_dtype)
    grad, x, w = grad.contiguous(), x.contiguous(), weight.float().contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    grad_x = torch.empty_like(x)
    rounds = added_dtype not in (None, torch.float32)
    grad_added = torch.empty_like(x, dtype=added_dtype) if rounds else None
    grad_w = torch.empty_like(w) if with_weight else None
    kernels.rms_norm_backward(
        RmsNormBackward(
            grad=address(grad),
            x=address(x),
            weight=address(w),
            inverse=address(inverse),
            grad_sum=address(grad_sum),
            grad_x=address(grad_x),
            grad_added=address(grad_added),
            grad_weight=address(grad_w),
            grad_dtype=DTYPE_CODES[grad.dtype],
            added_dtype=0 if grad_added is None else DTYPE_CODES[grad_added.dtype],
            rows=inverse.numel(),
            width=x.shape[-1],
        )
    )
    if added_dtype == torch.float32:
        grad_added = grad_x
    return grad_x, grad_added, None if grad_w is None else grad_w.to(weight.dtype)


def _plain_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    added_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    grad = grad.to(inverse.dtype)
    normal = x.to(inverse.dtype) * inverse
    grad_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
    grad = grad * weight
    scale = (grad * normal).mean(-1, keepdim=True)
    grad_x = grad.sub_(normal.mul_(scale)).mul_(inverse).to(x.dtype)
    if grad_sum is not None:
        grad_x += grad_sum
    return grad_x, None if added_dtype is None else grad_x.to(added_dtype), grad_weight
