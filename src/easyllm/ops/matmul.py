"""Matrix products (GEMM) with many rows, and linear layers with their gradients.

    Y = X Wᵀ + b        ∂X = ∂Y W        ∂W = ∂Yᵀ X        ∂b = Σ ∂Y

On a CPU with AMX, bf16 GEMMs run in a C kernel of this package. For a model as narrow as the
default one, PyTorch reaches only part of the throughput that AMX gives to large square matrices,
and half of that for ∂W, whose operands are transposed (figures in docs/kernels.md). With the
kernel, linear layers that share an input are one GEMM: X is read once, and ∂X is summed over all of
them before it is rounded. Everything else runs in PyTorch.
"""

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easyllm.ops.autograd import Context
from easyllm.ops.huge_memory import huge_empty
from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.structs import DTYPE_CODES, Block, Gemm, address

MIN_DIM = 32
"""Minimum number of rows, columns and inputs; below it, AMX tiles would be mostly empty."""
SMALL = 1 << 20
"""Minimum of rows x columns x inputs; below it, packing costs more than AMX saves."""
FEW_ROWS = 128
"""Maximum rows for which a weight beyond `LARGE` is not packed: it is read once, which takes longer
than the multiplications. An expert of a mixture gets as few."""
LARGE = 1 << 20
"""Minimum elements of such a weight, which then does not stay in the L2 cache."""
JOINED = 32
"""Rows, columns and inputs of matrices joined into one GEMM must be multiples of this."""
PLAIN = (Tensor, nn.Parameter)
"""Supported tensor types; sharded and traced tensors have no directly addressable memory."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x Wᵀ + b; differentiable.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None; of one dtype, unless autocast casts them.

    Returns:
        [..., N]; sums are accumulated in fp32, or in fp64 for fp64 inputs.
    """
    return linears(x, [weight], [bias])[0]


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Applies several linear layers to one input, in a single GEMM where the kernel supports it.

    Args:
        x: [..., K].
        weights: [N_i, K] each.
        biases: [N_i] or None, one for each weight.

    Returns:
        [..., N_i] for each weight.
    """
    if len(weights) > 1 and any(len(weight) % JOINED for weight in weights):
        return tuple(linear(x, *each) for each in zip(weights, biases, strict=True))
    num_rows, columns = x.numel() // max(1, x.shape[-1]), sum(len(weight) for weight in weights)
    fits = all(
        x.shape[-1] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])
        for weight, bias in zip(weights, biases, strict=True)
    )
    few = _has_few_rows(num_rows, weights)
    if not fits or _kernels((x, *weights), num_rows, columns, x.shape[-1], few=few) is None:
        return tuple(F.linear(x, *each) for each in zip(weights, biases, strict=True))
    trained = any(t is not None and t.requires_grad for t in (x, *weights, *biases))
    if torch.is_grad_enabled() and trained:
        found: tuple[Tensor, ...] = _FusedLinears.apply(x, len(weights), *weights, *biases)
        return found
    return _linears(x, weights, biases)


def matmul(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """Returns a b + bias; not differentiable.

    Args:
        a: [M, K]; b: [K, N]; of one dtype; both may be transposed views.
        bias: [N] or None.
        out: [M, N] with contiguous rows, dtype of `a` or fp32; receives the result.
        add: accumulate into `out`, which must be fp32.

    Returns:
        [M, N], dtype of `a` or of `out`. The kernel is batch-invariant: an element is bitwise
        independent of the other rows and columns.

    Raises:
        ValueError: `out` has the wrong shape.
    """
    (rows, depth), columns = a.shape, b.shape[1]
    if out is not None and out.shape != (rows, columns):
        raise ValueError(f"out has shape {tuple(out.shape)}, expected {(rows, columns)}")
    fits = b.shape[0] == depth and (bias is None or bias.shape == (columns,))
    if out is not None:
        fits = fits and out.stride(1) == 1 and out.dtype in DTYPE_CODES
        fits = fits and (not add or out.dtype == torch.float32)
    kernels = _kernels((a, b), rows, columns, depth) if fits else None
    if kernels is None:  # torch.mm raises if the shapes do not match
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


def grouped_matmul(a: Sequence[Tensor], b: Tensor) -> list[Tensor]:
    """Multiplies several matrices by one, in a single GEMM where the kernel supports it.

    Args:
        a: [M_i, K] each; b: [K, N].

    Returns:
        [M_i, N] for each of `a`.
    """
    rows, (depth, columns) = sum(len(each) for each in a), b.shape
    joined = len(a) == 1 or all(len(each) % JOINED == 0 for each in a)
    few = depth <= FEW_ROWS and rows * columns >= LARGE
    kernels = _kernels((*a, b), rows, columns, depth, few=few) if joined else None
    if kernels is None:
        return [matmul(each, b) for each in a]
    out = [b.new_empty(len(each), columns) for each in a]
    _call(kernels, a, [b], out)
    return out


def sum_of_matmuls(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Returns Σ aᵢ bᵢ.

    The kernel accumulates the complete sum in fp32 and rounds it once. With few rows and large
    matrices PyTorch computes each product, and rounds each sum.

    Args:
        a: [M, K_i] each; b: [K_i, N] each.

    Returns:
        [M, N], dtype of `a`.
    """
    if _has_few_rows(len(a[0]), b):  # PyTorch packs less
        out = a[0] @ b[0]
        for x, y in zip(a[1:], b[1:], strict=True):
            out.addmm_(x, y)
        return out
    rows, columns, depth = len(a[0]), b[0].shape[1], sum(len(each) for each in b)
    joined = len(a) > 1 and all(len(each) % JOINED == 0 for each in b)
    kernels = _kernels((*a, *b), rows, columns, depth) if joined else None
    if kernels is not None:
        out = a[0].new_empty(rows, columns)
        _call(kernels, a, b, [out])
        return out
    out = matmul(a[0], b[0])
    for x, y in zip(a[1:], b[1:], strict=True):
        out += matmul(x, y)
    return out


class _FusedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, count: int, *layers: Any) -> tuple[Tensor, ...]:
        weights, biases = layers[:count], layers[count:]
        of_x, _, *of_layers = ctx.needs_input_grad
        of_weights = any(of_layers[:count])
        ctx.save_for_backward(x if of_weights else None, *(weights if of_x else ()))
        ctx.shape = x.shape
        return _linears(x, weights, biases)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        of_x, _, *of_layers = ctx.needs_input_grad
        of_weights, of_biases = of_layers[: len(grads)], of_layers[len(grads) :]
        errors = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        again = torch.is_grad_enabled()  # double backward needs PyTorch's products
        of_rows = None
        if of_x:
            of_rows = (
                torch.cat(errors, 1) @ torch.cat(weights)
                if again
                else sum_of_matmuls(errors, weights)
            )
            # avoid a needless view: autograd would copy it to accumulate gradients
            if len(ctx.shape) != 2:
                of_rows = of_rows.view(ctx.shape)
        transposed = [e.T for e, is_wanted in zip(errors, of_weights, strict=True) if is_wanted]
        made: Sequence[Tensor] = ()
        if transposed:
            rows = x.reshape(len(errors[0]), -1)
            made = [e @ rows for e in transposed] if again else grouped_matmul(transposed, rows)
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
    assert kernels is not None, "checked by linears()"
    if _has_few_rows(len(rows), weights) and all(bias is None for bias in biases):
        # (W Xᵀ)ᵀ: tiles of the first operand are loaded in place
        turned = [
            y.new_empty(len(weight), len(rows)) for y, weight in zip(out, weights, strict=True)
        ]
        _call(kernels, weights, [rows.T], turned)
        for y, product in zip(out, turned, strict=True):
            y.copy_(product.T)
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in out)
    bias = None
    if any(each is not None for each in biases):
        pairs = zip(weights, biases, strict=True)
        bias = torch.cat([w.new_zeros(len(w)) if each is None else each for w, each in pairs])
    _call(kernels, [rows], [weight.T for weight in weights], out, bias=bias)
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in out)


def _has_few_rows(rows: int, weights: Sequence[Tensor]) -> bool:
    """Whether reading the weights takes longer than multiplying them by so few rows."""
    return rows <= FEW_ROWS and sum(weight.numel() for weight in weights) >= LARGE


def _kernels(
    operands: Sequence[Tensor], rows: int, columns: int, depth: int, *, few: bool = False
) -> ctypes.CDLL | None:
    """Returns the kernels if they support a GEMM of these operands and are faster, else None.

    With `few`, one of the dimensions may be below `MIN_DIM`.
    """
    if torch.compiler.is_compiling() or any(x.dtype != torch.bfloat16 for x in operands):
        return None
    if (min(rows, columns, depth) < MIN_DIM and not few) or rows * columns * depth < SMALL:
        return None
    if any(type(x) not in PLAIN for x in operands) or torch.is_autocast_enabled("cpu"):
        return None
    kernels = kernels_for(*operands)
    return kernels if kernels is not None and kernels.gemm_ready() else None


def _call(
    kernels: ctypes.CDLL,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    out: Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    add: bool = False,
) -> None:
    """Writes matrix products to `out`.

    Several matrices in `a` alone are stacked by rows and give one result each; several in `b` alone
    are stacked by columns and do the same. With several in both, the products are summed.
    """
    summed = len(a) > 1 and len(b) > 1
    a, b = _in_rows(a), _in_rows(b)  # keep references: they may be copies
    rows = sum(len(y) for y in out) if len(a) > 1 else len(out[0])
    columns = sum(y.shape[1] for y in out) if len(b) > 1 else out[0].shape[1]
    wide = None if bias is None else bias.float().contiguous()
    depth = sum(len(y) for y in b) if summed else len(b[0])
    kernels.gemm(
        Gemm(
            a=_blocks(a, 1 if summed else 0),
            b=_blocks(b, 0 if summed else 1),
            c=_blocks(out, 0 if len(a) > 1 else 1),
            a_count=len(a),
            b_count=len(b),
            a_transposed=_is_transposed(a),
            b_transposed=_is_transposed(b),
            bias=address(wide),
            c_dtype=DTYPE_CODES[out[0].dtype],
            add=add,
            rows=rows,
            columns=columns,
            depth=depth,
            workspace=_workspace.address(kernels.gemm_bytes(rows, columns, depth)),
        )
    )


def _in_rows(operands: Sequence[Tensor]) -> list[Tensor]:
    """Returns the operands if all are row-major or all column-major, else contiguous copies."""
    for has_order in (is_row_major, lambda x: is_row_major(x.T)):
        if all(map(has_order, operands)):
            return list(operands)
    return [x.contiguous() for x in operands]


def is_row_major(x: Tensor) -> bool:
    """Returns whether each row of a matrix is contiguous and does not overlap another."""
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1]


def _is_transposed(matrices: Sequence[Tensor]) -> bool:
    """Returns whether matrices, as returned by `_in_rows`, are column-major."""
    return not all(map(is_row_major, matrices))


def _blocks(matrices: Sequence[Tensor], dim: int) -> ctypes.Array[Block]:
    """Returns matrices that are joined along `dim` as the kernel expects them."""
    rows = 1 if _is_transposed(matrices) else 0
    blocks = [Block(data=address(x), stride=x.stride(rows), size=x.shape[dim]) for x in matrices]
    return (Block * len(blocks))(*blocks)


class _Workspace(threading.local):
    """A thread's workspace for packed operands.

    It is cached for reuse, because fresh memory costs as much as a small GEMM.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def address(self, num_bytes: int) -> int:
        if len(self.memory) < num_bytes:
            self.memory = huge_empty((num_bytes,), torch.uint8)
        return self.memory.data_ptr()  # PyTorch and mmap align to a cache line


_workspace = _Workspace()
