"""Linear layers with weights whose scales are quantized themselves: GGUF's K-quants.

Shapes: N outputs, K inputs, a multiple of 256; a super-block is 256 inputs of an output.

    minima   w = d a q − e b       4 or 5 bits; a and b, 6 bits, for 32 inputs; d and e fp16
    scales   w = d a (q − 32)      6 bits; a, 8 bits with a sign, for 16 inputs; d fp16

Products: `ops.packed_linear`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.ops.grouped_linear import (
    GROUP,
    OUTPUTS,
    from_chunks,
    from_lanes,
    pack_codes,
    to_chunks,
    to_lanes,
    unpack_codes,
)
from easyllm.ops.kernels.structs import GROUPED, Matrix, address

SUPER = 256
GROUPS = SUPER // GROUP
SUPER_MINIMA, SUPER_SCALES = 3, 4
"""SHIFT_SUPER_MINIMA and SHIFT_SUPER_SCALES of kernels/matrix.h."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperBlocks:
    """The parts of a weight [N, K] with quantized scales; S = K / 256.

    Attributes:
        codes: [N, K] uint8.
        parts: [N, K/32, 2] uint8: a and b with minima; otherwise the bits of a for the first and
            the last 16 inputs of a group.
        scales: d [N, S], fp16.
        minima: e [N, S], fp16; None without minima.
    """

    codes: Tensor
    parts: Tensor
    scales: Tensor
    minima: Tensor | None


@dataclass(frozen=True, slots=True)
class SuperMatrix:
    """A weight [N, K] in the layout of kernels/super.c.

    Attributes:
        data: uint8 [⌈N/8⌉, bytes of 8 outputs].
        bits: bits of a code; 6 has scales, others have minima.
        outputs, inputs: N and K.
    """

    data: Tensor
    bits: int
    outputs: int
    inputs: int

    @property
    def _tail(self) -> int:
        """Bytes of d, and e, of 8 outputs."""
        return OUTPUTS * (2 if self.bits == 6 else 4)

    def unpack(self, first: int = 0, last: int | None = None) -> SuperBlocks:
        """Returns the parts of rows `first`, a multiple of 8, to `last` (exclusive)."""
        last = self.outputs if last is None else last
        count, width = last - first, self.bits * GROUP
        data = self.data[first // OUTPUTS : -(-last // OUTPUTS)]
        supers = data.view(len(data), self.inputs // SUPER, GROUPS * (width + 16) + self._tail)
        groups = supers[..., : GROUPS * (width + 16)].reshape(
            len(data), self.inputs // GROUP, width + 16
        )
        codes = from_chunks(unpack_codes(groups[..., :width], self.bits))
        parts = [from_lanes(groups[..., at : at + 8]) for at in (width, width + 8)]
        tail = supers[..., GROUPS * (width + 16) :].contiguous().view(torch.float16)
        return SuperBlocks(
            codes=codes[:count],
            parts=torch.stack(parts, dim=2)[:count],
            scales=from_lanes(tail[..., :8])[:count],
            minima=None if self.bits == 6 else from_lanes(tail[..., 8:])[:count],
        )

    def dequantize(self, first: int = 0, last: int | None = None) -> Tensor:
        """Returns rows `first`, a multiple of 8, to `last` (exclusive), [n, K] fp32."""
        its = self.unpack(first, last)
        return dequantize_super(its)

    def struct(self, bias: Tensor | None) -> Matrix:
        """Returns the weight as the kernels expect it; it and `bias`, fp32, must outlive it."""
        return Matrix(
            data=address(self.data),
            bias=address(bias),
            outputs=self.outputs,
            inputs=self.inputs,
            format=GROUPED,
            bits=self.bits,
            shift=SUPER_SCALES if self.bits == 6 else SUPER_MINIMA,
            span=GROUPS,
        )


def dequantize_super(its: SuperBlocks) -> Tensor:
    """Returns the weight [N, K] in fp32."""
    outputs, inputs = its.codes.shape
    codes = its.codes.float().view(outputs, inputs // SUPER, GROUPS, GROUP)
    scales = its.scales.float()[:, :, None, None]
    parts = its.parts.view(*codes.shape[:3], 2)
    if its.minima is None:
        factors = scales * parts.view(torch.int8).float()
        values: Tensor = (codes - 32).unflatten(3, (2, 16)).mul_(factors[..., None])
    else:
        below = its.minima.float()[:, :, None, None] * parts[..., 1:].float()
        values = codes.mul_(scales * parts[..., :1].float()).sub_(below)
    return values.reshape(outputs, inputs)


def pack_super(its: SuperBlocks, bits: int) -> SuperMatrix:
    """Packs the parts of a weight."""
    outputs, inputs = its.codes.shape
    padded = F.pad(its.codes, (0, 0, 0, -outputs % OUTPUTS))
    packed = pack_codes(to_chunks(padded), bits).flatten(2)  # [N/8, K/32, bytes]
    parts = [to_lanes(its.parts[..., i]) for i in (0, 1)]
    groups = torch.cat([packed, *parts], dim=2)
    ends = [to_lanes(its.scales).view(torch.uint8)]
    if its.minima is not None:
        ends.append(to_lanes(its.minima).view(torch.uint8))
    blocks = groups.unflatten(1, (-1, GROUPS)).flatten(2)  # [N/8, S, bytes]
    data = torch.cat([blocks, *ends], dim=2).flatten(1).contiguous()
    return SuperMatrix(data, bits, outputs, inputs)


__all__ = ["SUPER", "SuperBlocks", "SuperMatrix", "dequantize_super", "pack_super"]
