"""Linear layers with int8 or int4 weights.

Shapes: N outputs, K inputs, T rows, G = ⌈K/32⌉ groups of inputs.

    int8   w = s_n q             scale per output channel, symmetric              q in -127 .. 127
    int4   w = s (q - 8) + c     scale and offset per output and 32 inputs        q in 0 .. 15

Products: `ops.packed_linear`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.ops.kernels.structs import BIT_CODES, Matrix, address

GROUP = 32
"""Group size: inputs that share a scale."""
OUTPUTS = 8
"""Outputs whose codes are interleaved; see kernels/matrix.h for the layout."""


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

    def dequantize(self, first: int = 0, last: int | None = None) -> Tensor:
        """Returns rows `first`, a multiple of 8, to `last` (exclusive), [n, K] fp32."""
        last = self.outputs if last is None else last
        data = self.data[first // OUTPUTS : -(-last // OUTPUTS)]
        blocks, groups = data.shape[:2]
        if self.scales is not None:
            values = data.view(blocks, groups, 8, OUTPUTS, 4).float()
            values *= self.scales[first:].view(-1, 1, 1, OUTPUTS, 1)[:blocks]
        else:
            both = data[..., :128].reshape(blocks, groups, 4, OUTPUTS, 4)
            values = torch.cat([both & 15, both >> 4], dim=2).float().sub_(8)
            step, middle = data[..., 128:].contiguous().view(torch.float16).float().chunk(2, dim=2)
            values = values.mul_(step[:, :, None, :, None]).add_(middle[:, :, None, :, None])
        weight = values.permute(0, 3, 1, 2, 4).reshape(blocks * OUTPUTS, -1)
        return weight[: last - first, : self.inputs]

    def struct(self, bias: Tensor | None) -> Matrix:
        """Returns the weight as the kernels expect it; it and `bias`, fp32, must outlive it."""
        return Matrix(
            data=address(self.data),
            scales=address(self.scales),
            bias=address(bias),
            outputs=self.outputs,
            inputs=self.inputs,
            format=BIT_CODES[self.bits],
        )


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


def dequantize_rows(matrix: QuantizedMatrix, rows: Tensor) -> Tensor:
    """Returns rows `rows: [T]` of an int8 weight as [T, K] fp32: an embedding lookup."""
    assert matrix.scales is not None, "embeddings are int8"
    shape = (matrix.data.shape[0], -1, 8, OUTPUTS, 4)
    codes = matrix.data.view(shape)[rows // OUTPUTS, :, :, rows % OUTPUTS]  # [T, G, 8 chunks, 4]
    return codes.flatten(1)[:, : matrix.inputs].float() * matrix.scales[rows, None]


def quantize_rows(x: Tensor) -> Tensor:
    """Quantizes `x: [..., K]` to int8 as the kernel does, and dequantizes it.

    The kernel's result is exact for these values.
    """
    groups = F.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    unit = groups.abs().amax(-1, keepdim=True) / 127
    codes = (groups / unit.clamp(min=1e-38)).round()
    rounded: Tensor = (codes * unit).flatten(-2)[..., : x.shape[-1]]
    return rounded


def _chunks(codes: Tensor, fill: int) -> Tensor:
    """Rearranges [N, K] to [⌈N/8⌉, G, 8 chunks, 8 outputs, 4 inputs], padded with `fill`."""
    outputs, inputs = codes.shape
    codes = F.pad(codes, (0, -inputs % GROUP, 0, -outputs % OUTPUTS), value=fill)
    return codes.view(-1, OUTPUTS, codes.shape[1] // GROUP, 8, 4).permute(0, 2, 3, 1, 4)
