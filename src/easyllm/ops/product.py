"""Matrix products of many rows, and linear layers made of them with their gradients.

    Y = X Wᵀ + b        ∂X = ∂Y W        ∂W = ∂Yᵀ X        ∂b = Σ ∂Y

On a CPU with a matrix unit (AMX), bf16 products run in a kernel of ours: PyTorch's reach a part of what the unit gives to
large square matrices when a model is as narrow as the default one, and for ∂W, whose operands lie the other way, half of that
(figures in docs/kernels.md). Layers of one input are one product there: X is read once, and ∂X summed over all of them
before it is rounded. Everything else is PyTorch's.
"""

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easyllm.ops.huge_memory import huge_empty
from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.build import DTYPE_CODES, Part

FEWEST = 32
"""Rows, columns and inputs below which tiles are mostly empty."""
SMALL = 1 << 20
"""Products (rows x columns x inputs) below which packing costs more than the unit saves."""
JOINED = 32
"""Rows, columns and inputs of matrices that are joined come in multiples of this."""
PLAIN = (Tensor, nn.Parameter)
"""Not the sharded and traced kinds, whose memory is not what it seems."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, differentiable.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None; one dtype, unless autocast casts them.

    Returns:
        [..., N]; products are summed in fp32, or in fp64 for fp64.
    """
    return linears(x, [weight], [bias])[0]


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """`linear` of one input with each of several weights, where it can in one product."""
    if len(weights) > 1 and any(len(weight) % JOINED for weight in weights):
        return tuple(linear(x, *each) for each in zip(weights, biases, strict=True))
    num_rows, columns = x.numel() // max(1, x.shape[-1]), sum(len(weight) for weight in weights)
    fits = all(
        x.shape[-1] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])
        for weight, bias in zip(weights, biases, strict=True)
    )
    if not fits or _kernels((x, *weights), num_rows, columns, x.shape[-1]) is None:
        return tuple(F.linear(x, *each) for each in zip(weights, biases, strict=True))
    trained = any(t is not None and t.requires_grad for t in (x, *weights, *biases))
    if torch.is_grad_enabled() and trained:
        found: tuple[Tensor, ...] = _Linears.apply(x, len(weights), *weights, *biases)
        return found
    return _linears(x, weights, biases)


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
    kernels = _kernels((a, b), rows, columns, depth) if fits else None
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
    _call(kernels, [a], [b], [out], bias=bias, add=add)
    return out


def products(a: Sequence[Tensor], b: Tensor) -> list[Tensor]:
    """`product` of each of `a: [M, K]` with `b: [K, N]`, where it can in one."""
    rows, (depth, columns) = sum(len(each) for each in a), b.shape
    joined = len(a) > 1 and all(len(each) % JOINED == 0 for each in a)
    kernels = _kernels((*a, b), rows, columns, depth) if joined else None
    if kernels is None:
        return [product(each, b) for each in a]
    out = [b.new_empty(len(each), columns) for each in a]
    _call(kernels, a, [b], out)
    return out


def sum_of_products(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Σ aᵢ bᵢ, for `a: [M, Kᵢ]` and `b: [Kᵢ, N]`; rounded once where the kernel serves."""
    rows, columns, depth = len(a[0]), b[0].shape[1], sum(len(each) for each in b)
    joined = len(a) > 1 and all(len(each) % JOINED == 0 for each in b)
    kernels = _kernels((*a, *b), rows, columns, depth) if joined else None
    if kernels is not None:
        out = a[0].new_empty(rows, columns)
        _call(kernels, a, b, [out])
        return out
    out = product(a[0], b[0])
    for x, y in zip(a[1:], b[1:], strict=True):
        out += product(x, y)
    return out


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *layers: Any) -> tuple[Tensor, ...]:
        weights, biases = layers[:count], layers[count:]
        of_x, _, *of_layers = ctx.needs_input_grad
        of_weights = any(of_layers[:count])
        ctx.save_for_backward(x if of_weights else None, *(weights if of_x else ()))
        ctx.shape = x.shape
        return _linears(x, weights, biases)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        of_x, _, *of_layers = ctx.needs_input_grad
        of_weights, of_biases = of_layers[: len(grads)], of_layers[len(grads) :]
        errors = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        again = torch.is_grad_enabled()  # PyTorch's for a gradient that is differentiated again
        of_rows = None
        if of_x:
            of_rows = (
                torch.cat(errors, 1) @ torch.cat(weights)
                if again
                else sum_of_products(errors, weights)
            )
            # no view where none is needed: autograd would make copies to add to
            if len(ctx.shape) != 2:
                of_rows = of_rows.view(ctx.shape)
        turned = [e.T for e, is_wanted in zip(errors, of_weights, strict=True) if is_wanted]
        made: Sequence[Tensor] = ()
        if turned:
            rows = x.reshape(len(errors[0]), -1)
            made = [e @ rows for e in turned] if again else products(turned, rows)
        of_each = iter(made)
        return (
            of_rows,
            None,
            *(next(of_each) if is_wanted else None for is_wanted in of_weights),
            *(
                e.sum(0) if is_wanted else None
                for e, is_wanted in zip(errors, of_biases, strict=True)
            ),
        )


def _linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    rows = x.reshape(-1, x.shape[-1])
    out = [rows.new_empty(len(rows), len(weight)) for weight in weights]
    kernels = kernels_for(*weights)
    assert kernels is not None, "asked before"
    bias = None
    if any(each is not None for each in biases):
        pairs = zip(weights, biases, strict=True)
        bias = torch.cat([w.new_zeros(len(w)) if each is None else each for w, each in pairs])
    _call(kernels, [rows], [weight.T for weight in weights], out, bias=bias)
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in out)


def _kernels(operands: Sequence[Tensor], rows: int, columns: int, depth: int) -> ctypes.CDLL | None:
    """The kernels, if they serve a product of these sizes and it is worth it."""
    if torch.compiler.is_compiling() or any(x.dtype != torch.bfloat16 for x in operands):
        return None
    if min(rows, columns, depth) < FEWEST or rows * columns * depth < SMALL:
        return None
    if any(type(x) not in PLAIN for x in operands) or torch.is_autocast_enabled("cpu"):
        return None
    kernels = kernels_for(*operands)
    return kernels if kernels is not None and kernels.product_ready() else None


def _call(
    kernels: ctypes.CDLL,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    out: Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    add: bool = False,
) -> None:
    """Fills `out`. Several of `a` above each other give several results, several of `b` beside each other do; of both, the sum."""
    summed = len(a) > 1 and len(b) > 1
    a, b = _in_rows(a), _in_rows(b)  # keeps them alive, should they be copies
    rows = sum(len(y) for y in out) if len(a) > 1 else len(out[0])
    columns = sum(y.shape[1] for y in out) if len(b) > 1 else out[0].shape[1]
    wide = None if bias is None else bias.float().contiguous()
    depth = sum(len(y) for y in b) if summed else len(b[0])
    kernels.product(
        *_parts(a, 1 if summed else 0),
        *_parts(b, 0 if summed else 1),
        None if wide is None else wide.data_ptr(),
        _parts(out, 0 if len(a) > 1 else 1)[0],
        DTYPE_CODES[out[0].dtype],
        add,
        rows,
        columns,
        depth,
        _room.address(kernels.product_bytes(rows, columns, depth)),
    )


def _in_rows(operands: Sequence[Tensor]) -> list[Tensor]:
    """Operands whose rows, or all of whose columns, lie in one piece: themselves or copies."""
    for lies in (_lies_in_rows, lambda x: _lies_in_rows(x.T)):
        if all(map(lies, operands)):
            return list(operands)
    return [x.contiguous() for x in operands]


def _lies_in_rows(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1]


def _parts(matrices: Sequence[Tensor], dim: int) -> tuple[ctypes.Array[Part], int, bool]:
    """Matrices joined along a dimension, their number, and whether columns lie in one piece in the place of rows."""
    turned = not all(map(_lies_in_rows, matrices))
    parts = [Part(x.data_ptr(), x.stride(1 if turned else 0), x.shape[dim]) for x in matrices]
    return (Part * len(parts))(*parts), len(parts), turned


class _Room(threading.local):
    """Where a thread's products lay out their operands. It is kept: fresh memory costs as much as a small product."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def address(self, num_bytes: int) -> int:
        if len(self.memory) < num_bytes:
            self.memory = huge_empty((num_bytes,), torch.uint8)
        return self.memory.data_ptr()  # PyTorch and the system hand out whole cache lines


_room = _Room()
