"""Linear layers with int8 or int4 weights.

Shapes: N outputs, K inputs, T rows, G = ⌈K/32⌉ groups of inputs.

    int8   w = s_n q             scale per output channel, symmetric              q in -127 .. 127
    int4   w = s (q - 8) + c     scale and offset per output and 32 inputs        q in 0 .. 15

On a CPU the C kernel also quantizes each activation row to int8, with a scale for every 32 inputs
(as llama.cpp does), so that dot products of codes are exact integers; its results are
batch-invariant. Without a compiler, on other devices, and where a gradient is needed (an adapter on
a quantized base), the weights are dequantized block by block and multiplied in the dtype of the
rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.ops.autograd import Context
from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.structs import BIT_CODES, DTYPE_CODES, Matrix, address

GROUP = 32
"""Group size: inputs that share a scale."""
OUTPUTS = 8
"""Outputs whose codes are interleaved; see kernels/matrix.h for the layout."""
BLOCK_OUTPUTS = 4096
"""Outputs that are dequantized at a time."""


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A quantized weight [N, K] in the kernel's layout, which is the same on every machine.

    Attributes:
        data: int8 [⌈N/8⌉, G, 256], or for int4 uint8 [⌈N/8⌉, G, 160], which contains the codes and
            the fp16 scales and offsets.
        scales: fp32 [⌈N/8⌉ · 8] per output channel; None for int4.
        outputs, inputs: N and K.
    """

    data: Tensor
    scales: Tensor | None
    outputs: int
    inputs: int

    @property
    def bits(self) -> int:
        """Bits per weight, 4 or 8."""
        return 4 if self.scales is None else 8


def pack_int8(codes: Tensor, scales: Tensor) -> QuantizedMatrix:
    """Packs int8 `codes: [N, K]` and per-channel `scales: [N]` into the kernel's layout."""
    outputs, inputs = codes.shape
    chunks = _chunks(codes, 0)  # [N/8, G, 8 chunks, 8 outputs, 4]
    filled = F.pad(scales.float(), (0, -outputs % OUTPUTS))
    return QuantizedMatrix(chunks.flatten(2).contiguous(), filled, outputs, inputs)


def pack_int4(codes: Tensor, scales: Tensor, offsets: Tensor) -> QuantizedMatrix:
    """Packs int4 codes with their scales and offsets into the kernel's layout.

    Args:
        codes: [N, K] uint8 in 0 .. 15.
        scales, offsets: scales and offsets, [N, G]; stored in fp16.
    """
    outputs, inputs = codes.shape
    # padding contributes nothing: code 8 leaves only the offset, which is multiplied by zero inputs
    chunks = _chunks(codes, 8)
    low, high = chunks.chunk(2, dim=2)
    parts = [(low | (high << 4)).flatten(2)]
    for numbers in (scales, offsets):
        filled = F.pad(numbers.to(torch.float16), (0, 0, 0, -outputs % OUTPUTS))
        lanes = filled.view(-1, OUTPUTS, filled.shape[1]).transpose(1, 2)  # [N/8, G, 8]
        parts.append(lanes.contiguous().view(torch.uint8))
    return QuantizedMatrix(torch.cat(parts, dim=2), None, outputs, inputs)


def packed_bytes(outputs: int, inputs: int, bits: int) -> int:
    """Returns the size in bytes of a [N, K] weight packed with 4 or 8 bits."""
    blocks, groups = -(-outputs // OUTPUTS), -(-inputs // GROUP)
    return blocks * groups * 160 if bits == 4 else blocks * (groups * 256 + OUTPUTS * 4)


def dequantize(matrix: QuantizedMatrix, first: int = 0, last: int | None = None) -> Tensor:
    """Returns rows `first` to `last` of the weight in fp32; all of them by default.

    Args:
        matrix: the quantized weight [N, K].
        first: first output, a multiple of 8.
        last: end of the outputs (exclusive); None means N.

    Returns:
        [last - first, K] fp32.
    """
    last = matrix.outputs if last is None else last
    data = matrix.data[first // OUTPUTS : -(-last // OUTPUTS)]
    blocks, groups = data.shape[:2]
    if matrix.scales is not None:
        values = data.view(blocks, groups, 8, OUTPUTS, 4).float()
        values *= matrix.scales[first:].view(-1, 1, 1, OUTPUTS, 1)[:blocks]
    else:
        both = data[..., :128].reshape(blocks, groups, 4, OUTPUTS, 4)
        values = torch.cat([both & 15, both >> 4], dim=2).float().sub_(8)
        step, middle = data[..., 128:].contiguous().view(torch.float16).float().chunk(2, dim=2)
        values = values.mul_(step[:, :, None, :, None]).add_(middle[:, :, None, :, None])
    weight = values.permute(0, 3, 1, 2, 4).reshape(blocks * OUTPUTS, -1)
    return weight[: last - first, : matrix.inputs]


def dequantize_rows(matrix: QuantizedMatrix, rows: Tensor) -> Tensor:
    """Returns rows `rows: [T]` of an int8 weight as [T, K] fp32: an embedding lookup."""
    assert matrix.scales is not None, "embeddings are int8"
    shape = (matrix.data.shape[0], -1, 8, OUTPUTS, 4)
    codes = matrix.data.view(shape)[rows // OUTPUTS, :, :, rows % OUTPUTS]  # [T, G, 8 chunks, 4]
    return codes.flatten(1)[:, : matrix.inputs].float() * matrix.scales[rows, None]


def quantized_linear(x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None = None) -> Tensor:
    """Returns x Wᵀ + b; differentiable with respect to `x`.

    Args:
        x: [..., K].
        matrix: the quantized weight [N, K].
        bias: [N] or None.

    Returns:
        [..., N], dtype of `x`.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Differentiable.apply(x, matrix, bias)
        return out
    kernels = kernels_for(x, matrix.scales if matrix.scales is not None else x)
    if kernels is None or matrix.data.device.type != "cpu":
        return reference_quantized_linear(x, matrix, bias)
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], matrix.outputs), dtype=x.dtype)
    bias = None if bias is None else bias.float()
    rows = x.numel() // matrix.inputs
    code = DTYPE_CODES[x.dtype]
    kernels.quantized_linear(address(x), address(y), code, rows, matrix_struct(matrix, bias))
    return y


def reference_quantized_linear(
    x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None = None
) -> Tensor:
    """Reference for `quantized_linear`: dequantizes the weight and does not quantize `x`."""
    parts = [
        F.linear(x, dequantize(matrix, first, min(first + BLOCK_OUTPUTS, matrix.outputs)).to(x))
        for first in range(0, matrix.outputs, BLOCK_OUTPUTS)
    ]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return y if bias is None else y + bias


def quantize_rows(x: Tensor) -> Tensor:
    """Quantizes `x: [..., K]` to int8 as the kernel does, and dequantizes it.

    The kernel's result is exact for these values.
    """
    groups = F.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    unit = groups.abs().amax(-1, keepdim=True) / 127
    codes = (groups / unit.clamp(min=1e-38)).round()
    rounded: Tensor = (codes * unit).flatten(-2)[..., : x.shape[-1]]
    return rounded


def matrix_struct(matrix: QuantizedMatrix, bias: Tensor | None) -> Matrix:
    """Returns the matrix as the kernels expect it.

    The matrix and `bias`, which is fp32, must outlive the struct.
    """
    return Matrix(
        data=address(matrix.data),
        scales=address(matrix.scales),
        bias=address(bias),
        outputs=matrix.outputs,
        inputs=matrix.inputs,
        format=BIT_CODES[matrix.bits],
    )


def _chunks(codes: Tensor, fill: int) -> Tensor:
    """Rearranges [N, K] to [⌈N/8⌉, G, 8 chunks, 8 outputs, 4 inputs], padded with `fill`."""
    outputs, inputs = codes.shape
    codes = F.pad(codes, (0, -inputs % GROUP, 0, -outputs % OUTPUTS), value=fill)
    return codes.view(-1, OUTPUTS, codes.shape[1] // GROUP, 8, 4).permute(0, 2, 3, 1, 4)


class _Differentiable(torch.autograd.Function):
    """The reference; saves only the quantized weight and dequantizes it again in backward."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None) -> Tensor:
        ctx.matrix = matrix
        return reference_quantized_linear(x, matrix, bias)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        total = grad.new_zeros((*grad.shape[:-1], ctx.matrix.inputs))
        for first in range(0, ctx.matrix.outputs, BLOCK_OUTPUTS):
            last = min(first + BLOCK_OUTPUTS, ctx.matrix.outputs)
            total += grad[..., first:last] @ dequantize(ctx.matrix, first, last).to(grad)
        return total, None, None
