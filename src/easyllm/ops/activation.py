"""Activations, and the gated product that feed-forwards of the GLU kind apply."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) ⊙ up, for `gate` and `up` of one shape and dtype.

    SiLU has a backward pass of its own that keeps the two inputs only and recomputes the rest.
    """
    if activation == "silu" and torch.is_grad_enabled() and gate.requires_grad:
        out: Tensor = _SiLUGate.apply(gate, up)
        return out
    return ACTIVATIONS[activation](gate) * up


class _SiLUGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        (grad,) = grads
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)
