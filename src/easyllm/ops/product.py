"""Matrix products of many rows, and the linear layer made of them with its gradients.

    Y = X Wᵀ + b        ∂X = ∂Y W        ∂W = ∂Yᵀ X        ∂b = Σ ∂Y

On a CPU with a matrix unit (AMX), bf16 products run in a kernel of ours: PyTorch's reach a part of what the unit gives to
large square matrices when a model is as narrow as the default one, and for ∂W, whose operands lie the other way, half of that
(figures in docs/kernels.md). Everything else is PyTorch's.
"""

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easyllm.ops.huge_memory import huge_empty
from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.build import DTYPE_CODES

FEWEST = 32
"""Rows, columns and inputs below which tiles are mostly empty."""
SMALL = 1 << 20
"""Products (rows x columns x inputs) below which packing costs more than the unit saves."""
PLAIN = (Tensor, nn.Parameter)
"""Not the sharded and traced kinds, whose memory is not what it seems."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, differentiable.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None; one dtype, unless autocast casts them.

    Returns:
        [..., N]; products are summed in fp32, or in fp64 for fp64.
    """
    num_rows = x.numel() // max(1, x.shape[-1])
    fits = x.shape[-1] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])
    if not fits or _kernels(x, weight, num_rows, *weight.shape) is None:
        return F.linear(x, weight, bias)
    trained = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and trained:
        out: Tensor = _Linear.apply(x, weight, bias)
        return out
    return _linear(x, weight, bias)


def product(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """a b + bias; not differentiable.

    Args:
        a: [M, K]; b: [K, N]; of one dtype; both may be transposes. bias: [N] or None.
        out: [M, N] with its rows in one piece, dtype of `a` or fp32, is written to.
        add: add to what `out`, which is fp32, holds.

    Returns:
        [M, N], dtype of `a` or `out`. Where the kernel serves, an element has the same bits whatever rows and columns are
        beside it.

    Raises:
        ValueError: `out` has another shape.
    """
    (rows, depth), columns = a.shape, b.shape[1]
    if out is not None and out.shape != (rows, columns):
        raise ValueError(f"out is {tuple(out.shape)}, the product {(rows, columns)}")
    fits = b.shape[0] == depth and (bias is None or bias.shape == (columns,))
    if out is not None:
        fits = fits and out.stride(1) == 1 and out.dtype in DTYPE_CODES
        fits = fits and (not add or out.dtype == torch.float32)
    kernels = _kernels(a, b, rows, columns, depth) if fits else None
    if kernels is None:  # what fits nowhere is refused there
        found = torch.mm(
            a, b, out=out if out is not None and out.dtype == a.dtype and not add else None
        )
        if bias is not None:
            found += bias
        if out is None or found is out:
            return found
        return out.add_(found) if add else out.copy_(found)
    if out is None:
        out = a.new_empty(rows, columns)
    a, b = _in_rows(a), _in_rows(b)  # keeps them alive, should they be copies
    wide = None if bias is None else bias.float().contiguous()
    kernels.product(
        *_layout(a),
        *_layout(b),
        None if wide is None else wide.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        DTYPE_CODES[out.dtype],
        add,
        rows,
        columns,
        depth,
        _room.address(kernels.product_bytes(rows, columns, depth)),
    )
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.shape = x.shape
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        of_x, of_weight, of_bias = ctx.needs_input_grad
        # PyTorch's for a gradient that is differentiated again
        times = torch.mm if torch.is_grad_enabled() else product
        of_rows = times(grad, weight) if of_x else None
        # no view where none is needed: autograd would make copies to add to
        if of_rows is not None and len(ctx.shape) != 2:
            of_rows = of_rows.view(ctx.shape)
        return (
            of_rows,
            times(grad.T, x.reshape(len(grad), -1)) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return product(rows, weight.T, bias=bias).view(*x.shape[:-1], weight.shape[0])


def _kernels(a: Tensor, b: Tensor, rows: int, columns: int, depth: int) -> ctypes.CDLL | None:
    """The kernels, if they serve a product of these sizes and it is worth it."""
    if torch.compiler.is_compiling() or a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16:
        return None
    if min(rows, columns, depth) < FEWEST or rows * columns * depth < SMALL:
        return None
    if not (type(a) in PLAIN and type(b) in PLAIN) or torch.is_autocast_enabled("cpu"):
        return None
    kernels = kernels_for(a, b)
    return kernels if kernels is not None and kernels.product_ready() else None


def _in_rows(x: Tensor) -> Tensor:
    """x, or a copy where neither its rows nor its columns lie in one piece."""
    rows, columns = x.stride()
    lies = (columns == 1 and rows >= x.shape[1]) or (rows == 1 and columns >= x.shape[0])
    return x if lies else x.contiguous()


def _layout(x: Tensor) -> tuple[int, int, bool]:
    """Address, stride, and whether columns lie in one piece in the place of rows."""
    rows, columns = x.stride()
    return (x.data_ptr(), rows, False) if columns == 1 else (x.data_ptr(), columns, True)


class _Room(threading.local):
    """Where a thread's products lay out their operands. It is kept: fresh memory costs as much as a small product."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def address(self, num_bytes: int) -> int:
        if len(self.memory) < num_bytes:
            self.memory = huge_empty((num_bytes,), torch.uint8)
        return self.memory.data_ptr()  # PyTorch and the system hand out whole cache lines


_room = _Room()
