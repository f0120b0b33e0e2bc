"""Linear layers with weights in a layout of the C kernels: int8, int4, and grids of 2 to 8 bits.

On a CPU the kernel also quantizes each activation row to int8, with a scale for every 32 inputs (as
llama.cpp does), so that dot products of codes are exact integers; its results are batch-invariant.
Without a compiler, on other devices, and where a gradient is needed (an adapter on a quantized
base), the weights are dequantized block by block and multiplied in the dtype of the rows. In
deterministic mode the forward pass uses the kernel even then, so that its result is that of the
engine; the gradient is that of the dequantized weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.ops.autograd import Context
from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.structs import DTYPE_CODES, Matrix, address

BLOCK_OUTPUTS = 4096
"""Outputs that are dequantized at a time."""
_DEQUANTIZES = ContextVar("dequantizes", default=False)


@contextmanager
def dequantized_products() -> Iterator[None]:
    """Context manager in which products without a gradient are those of a training step.

    For log-probabilities that are compared with ones that have a gradient, such as a reference's:
    the kernel's quantized activations would be a difference between equal models. Deterministic
    products stay as they are, because training has the kernel's there.
    """
    token = _DEQUANTIZES.set(True)
    try:
        yield
    finally:
        _DEQUANTIZES.reset(token)


class PackedMatrix(Protocol):
    """A quantized weight [N, K] in a layout of the C kernels."""

    @property
    def data(self) -> Tensor:
        """The codes."""

    @property
    def outputs(self) -> int:
        """N."""

    @property
    def inputs(self) -> int:
        """K."""

    def dequantize(self, first: int = 0, last: int | None = None) -> Tensor:
        """Returns rows `first`, a multiple of 8, to `last` (exclusive), [n, K] fp32."""

    def struct(self, bias: Tensor | None) -> Matrix:
        """Returns the weight as the kernels expect it; it and `bias`, fp32, must outlive it."""


def packed_linear(
    x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None, *, deterministic: bool = False
) -> Tensor:
    """Returns x Wᵀ + b; differentiable in `x` and `bias`.

    Args:
        x: [..., K].
        matrix: the quantized weight [N, K].
        bias: [N] or None.
        deterministic: whether the result with a gradient bitwise equals that without.

    Returns:
        [..., N], dtype of `x`.

    Raises:
        ValueError: the rows have another length than K.
    """
    if x.shape[-1] != matrix.inputs:  # the kernel would read beyond the rows
        raise ValueError(f"rows of {x.shape[-1]} values, expected {matrix.inputs}")
    trained = x.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and trained:
        out: Tensor = _Differentiable.apply(x, matrix, bias, deterministic)
        return out
    if _DEQUANTIZES.get() and not deterministic:
        return reference_packed_linear(x, matrix, bias)
    return _product(x, matrix, bias)


def _product(x: Tensor, matrix: PackedMatrix, bias: Tensor | None) -> Tensor:
    kernels = kernels_for(x)
    if kernels is None or matrix.data.device.type != "cpu":
        return reference_packed_linear(x, matrix, bias)
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], matrix.outputs), dtype=x.dtype)
    bias = None if bias is None else bias.float()
    rows, code = x.numel() // matrix.inputs, DTYPE_CODES[x.dtype]
    kernels.matrix_linear(address(x), address(y), code, rows, matrix.struct(bias))
    return y


def reference_packed_linear(x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """Reference for `packed_linear`: dequantizes the weight and does not quantize `x`."""
    parts = [F.linear(x, matrix.dequantize(*ends).to(x)) for ends in _blocks(matrix)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return y if bias is None else y + bias


def _blocks(matrix: PackedMatrix) -> list[tuple[int, int]]:
    """Returns the first and the last row of each part that is dequantized at a time."""
    return [
        (first, min(first + BLOCK_OUTPUTS, matrix.outputs))
        for first in range(0, matrix.outputs, BLOCK_OUTPUTS)
    ]


class _Differentiable(torch.autograd.Function):
    """Saves only the quantized weight and dequantizes it again in backward."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, matrix: PackedMatrix, bias: Tensor | None, deterministic: bool
    ) -> Tensor:
        ctx.matrix = matrix
        return (_product if deterministic else reference_packed_linear)(x, matrix, bias)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (grad,) = grads
        total = None
        if ctx.needs_input_grad[0]:
            total = grad.new_zeros((*grad.shape[:-1], ctx.matrix.inputs))
            for first, last in _blocks(ctx.matrix):
                total += grad[..., first:last] @ ctx.matrix.dequantize(first, last).to(grad)
        to_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return total, None, to_bias, None


__all__ = [
    "PackedMatrix",
    "dequantized_products",
    "packed_linear",
    "reference_packed_linear",
]
