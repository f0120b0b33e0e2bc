"""Activations, and the gated activation of GLU feed-forward layers."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.ops.autograd import Context
from easyllm.ops.gpu import triton_unsupported_reason
from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.structs import DTYPE_CODES

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Returns act(gate) ⊙ up, for `gate` and `up` of one shape and dtype.

    SiLU has a custom backward pass that saves only the two inputs and recomputes the rest. Its
    forward pass is bitwise identical with and without gradients.

    Args:
        gate, up: [..., D].
        activation: a key of `ACTIVATIONS`.
    """
    trained = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    if activation != "silu":
        activated = ACTIVATIONS[activation](gate)
        return activated * up if trained else activated.mul_(up)
    if trained:
        out: Tensor = _SiLUGate.apply(gate, up)
        return out
    return _silu_gate(gate, up)


def _silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    if triton_unsupported_reason(gate, up) is None:
        from easyllm.ops.gpu import activation

        return activation.silu_gate_forward(gate, up)
    kernels = kernels_for(gate, up)
    if kernels is None or not (gate.is_contiguous() and up.is_contiguous()):
        return F.silu(gate).mul_(up)
    out = torch.empty_like(gate)
    kernels.silu_gate_forward(gate.data_ptr(), up.data_ptr(), out.data_ptr(), *_rows(gate))
    return out


class _SiLUGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _silu_gate(gate, up)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        (grad,) = grads
        if triton_unsupported_reason(grad, gate, up) is None:
            from easyllm.ops.gpu import activation

            return activation.silu_gate_backward(grad, gate, up)
        kernels = kernels_for(grad, gate, up)
        if kernels is None or not (gate.is_contiguous() and up.is_contiguous()):
            return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
        grad = grad.contiguous()
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        kernels.silu_gate_backward(
            grad.data_ptr(),
            gate.data_ptr(),
            up.data_ptr(),
            grad_gate.data_ptr(),
            grad_up.data_ptr(),
            *_rows(gate),
        )
        return grad_gate, grad_up


def _rows(x: Tensor) -> tuple[int, int, int]:
    """Returns dtype code, number of rows and width, as the kernels expect them."""
    return DTYPE_CODES[x.dtype], x.numel() // x.shape[-1], x.shape[-1]
