"""silu(gate) ⊙ up and its backward pass in Triton, computed in fp32 and rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _forward_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < count
    g = tl.load(gate + at, mask=ok, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=ok)


@triton.jit
def _backward_kernel(grad, gate, up, grad_gate, grad_up, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < count
    o = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=ok, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=ok, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(
        grad_gate + at,
        (o * u * s * (1.0 + g * (1.0 - s))).to(grad_gate.dtype.element_ty),
        mask=ok,
    )
    tl.store(grad_up + at, (o * g * s).to(grad_up.dtype.element_ty), mask=ok)


def silu_gate_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) ⊙ up, for `gate` and `up` of one shape and dtype."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _forward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, out, gate.numel(), BLOCK=BLOCK)
    return out


def silu_gate_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of `gate` and `up`, given `grad` of the output."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    _backward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
        grad, gate, up, grad_gate, grad_up, gate.numel(), BLOCK=BLOCK
    )
    return grad_gate, grad_up
