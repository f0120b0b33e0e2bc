"""Linear layers with weights on grids of 2, 3, 4, 5 or 8 bits, as files store them.

Shapes: N outputs, K inputs, T rows, G groups of g inputs each (g a multiple of 32, or K).

    shift zeros    w = s (q - z)     s in fp16 or bf16 and z per output and group; without z, the
                                     middle code
    shift minima   w = s q + m       s and m in fp16

No weight is rounded a second time. Products: `ops.packed_linear`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.ops.kernels.structs import GROUPED, SCALE_CODES, Matrix, address

GROUP, OUTPUTS = 32, 8
"""Inputs and outputs whose codes are stored together; see kernels/grouped.c for the layout."""
BITS = (2, 3, 4, 5, 8)
NONE, ZEROS, MINIMA = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """How the codes of a weight are read.

    Attributes:
        bits: bits of a code.
        scale_dtype: dtype of the scales, fp16 or bf16.
        shift: `NONE`, `ZEROS` or `MINIMA`.
        group_size: g; K for one group per row.
    """

    bits: int
    scale_dtype: torch.dtype
    shift: int
    group_size: int

    def span(self, inputs: int) -> int:
        """Returns the number of groups of 32 that share a scale."""
        return -(-min(self.group_size, inputs) // GROUP)

    def code_bytes(self) -> int:
        """Returns the bytes of 32 inputs of 8 outputs."""
        return OUTPUTS * GROUP * self.bits // 8

    def header_bytes(self) -> int:
        """Returns the bytes of the scales and shifts of 8 outputs."""
        return 16 + {NONE: 0, ZEROS: 8, MINIMA: 16}[self.shift]

    def row_bytes(self, inputs: int) -> int:
        """Returns the bytes of 8 outputs."""
        groups = -(-inputs // GROUP)
        spans = -(-groups // self.span(inputs))
        return groups * self.code_bytes() + spans * self.header_bytes()


def unsupported_reason(grid: Grid, inputs: int) -> str | None:
    """Returns why the kernels do not support a grid; None if they do."""
    if grid.bits not in BITS:
        return f"{grid.bits} bits are not supported"
    if grid.scale_dtype not in SCALE_CODES:
        return f"scales in {grid.scale_dtype} are not supported"
    if grid.group_size % GROUP and grid.group_size < inputs:
        return f"groups of {grid.group_size} are not a multiple of {GROUP}"
    return None


@dataclass(frozen=True, slots=True)
class GroupedMatrix:
    """A weight [N, K] in the layout of kernels/grouped.c.

    Attributes:
        data: uint8 [⌈N/8⌉, grid.row_bytes(K)].
        grid: how it is read.
        outputs, inputs: N and K.
    """

    data: Tensor
    grid: Grid
    outputs: int
    inputs: int

    def unpack(self, first: int = 0, last: int | None = None) -> tuple[Tensor, ...]:
        """Returns codes, scales and shifts of rows `first`, a multiple of 8, to `last` (exclusive).

        Returns:
            [n, K] uint8, [n, G] fp32 and [n, G] fp32 (zero points or minima; the middle code for
            `NONE`).
        """
        grid, last = self.grid, self.outputs if last is None else last
        data = self.data[first // OUTPUTS : -(-last // OUTPUTS)]
        blocks, groups, span = len(data), -(-self.inputs // GROUP), grid.span(self.inputs)
        codes, headers = list[Tensor](), list[Tensor]()
        at, width = 0, grid.code_bytes()
        for start in range(0, groups, span):
            count = min(span, groups - start)
            codes.append(data[:, at : at + count * width].view(blocks, count, width))
            at += count * width
            headers.append(data[:, at : at + grid.header_bytes()])
            at += grid.header_bytes()
        chunks = unpack_codes(torch.cat(codes, dim=1), grid.bits)  # [N/8, groups, 8, 32]
        header = torch.stack(headers, dim=1).contiguous()  # [N/8, G, bytes]
        scales = from_lanes(header[..., :16].contiguous().view(grid.scale_dtype).float())
        if grid.shift == NONE:
            shifts = torch.full_like(scales, 1 << (grid.bits - 1))
        elif grid.shift == ZEROS:
            shifts = from_lanes(header[..., 16:].float())
        else:
            shifts = from_lanes(header[..., 16:].contiguous().view(torch.float16).float())
        count = last - first
        return from_chunks(chunks)[:count, : self.inputs], scales[:count], shifts[:count]

    def dequantize(self, first: int = 0, last: int | None = None) -> Tensor:
        """Returns rows `first`, a multiple of 8, to `last` (exclusive), [n, K] fp32."""
        codes, scales, shifts = self.unpack(first, last)
        size = self.grid.span(self.inputs) * GROUP
        index = torch.arange(self.inputs, device=codes.device) // size
        scale, shift, values = scales[:, index], shifts[:, index], codes.float()
        return values * scale + shift if self.grid.shift == MINIMA else (values - shift) * scale

    def struct(self, bias: Tensor | None) -> Matrix:
        """Returns the weight as the kernels expect it; it and `bias`, fp32, must outlive it."""
        return Matrix(
            data=address(self.data),
            bias=address(bias),
            outputs=self.outputs,
            inputs=self.inputs,
            format=GROUPED,
            bits=self.grid.bits,
            scale_type=SCALE_CODES[self.grid.scale_dtype],
            shift=self.grid.shift,
            span=self.grid.span(self.inputs),
        )


def pack(codes: Tensor, scales: Tensor, shifts: Tensor | None, grid: Grid) -> GroupedMatrix:
    """Packs a weight.

    Args:
        codes: [N, K] uint8.
        scales: [N, G], exactly representable in `grid.scale_dtype`.
        shifts: [N, G]: uint8 zero points, or minima representable in fp16; None for `NONE`.
        grid: how it is to be read.
    """
    outputs, inputs = codes.shape
    padded = F.pad(codes, (0, -inputs % GROUP, 0, -outputs % OUTPUTS))
    groups = padded.shape[1] // GROUP
    packed = pack_codes(to_chunks(padded), grid.bits).flatten(2)  # [N/8, groups, bytes]
    headers = [to_lanes(scales.to(grid.scale_dtype)).view(torch.uint8)]
    if shifts is not None:
        kept = shifts.to(torch.uint8 if grid.shift == ZEROS else torch.float16)
        headers.append(to_lanes(kept).view(torch.uint8))
    header = torch.cat(headers, dim=2)  # [N/8, G, bytes]
    span = grid.span(inputs)
    parts = list[Tensor]()
    for first in range(0, groups, span):
        parts += [packed[:, first : first + span].flatten(1), header[:, first // span]]
    return GroupedMatrix(torch.cat(parts, dim=1).contiguous(), grid, outputs, inputs)


def to_chunks(codes: Tensor) -> Tensor:
    """Rearranges codes [N, K] to [N/8, K/32, 8 chunks, 8 outputs x 4 inputs]."""
    split: Tensor = codes.view(-1, OUTPUTS, codes.shape[1] // GROUP, 8, 4)
    return split.permute(0, 2, 3, 1, 4).flatten(3)


def from_chunks(chunks: Tensor) -> Tensor:
    """Rearranges [N/8, K/32, 8, 32] to codes [N, K]."""
    rows: Tensor = chunks.unflatten(3, (OUTPUTS, 4)).permute(0, 3, 1, 2, 4)
    return rows.reshape(len(chunks) * OUTPUTS, chunks.shape[1] * GROUP)


def pack_codes(chunks: Tensor, bits: int) -> Tensor:
    """Packs [..., 8 chunks, 32] uint8 to [..., vectors, 32]."""
    if bits == 8:
        return (chunks.to(torch.int16) - 128).to(torch.int8).view(torch.uint8)
    if bits >= 4:
        vectors = (chunks[..., :4, :] & 15) | ((chunks[..., 4:, :] & 15) << 4)
    else:
        vectors = _pack_pairs(chunks & 3)
    if bits in (3, 5):
        places = torch.arange(8, dtype=torch.uint8, device=chunks.device)[:, None]
        plane = (((chunks >> (bits - 1)) & 1) << places).sum(-2).to(torch.uint8)
        vectors = torch.cat([vectors, plane[..., None, :]], dim=-2)
    if bits == 6:
        vectors = torch.cat([vectors, _pack_pairs(chunks >> 4)], dim=-2)
    return vectors


def _pack_pairs(chunks: Tensor) -> Tensor:
    """Packs [..., 8 chunks, 32] of 2 bits to [..., 2, 32]; bits 2k and 2k + 1 have chunk 2k + v."""
    pairs: Tensor = chunks.unflatten(-2, (4, 2))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=chunks.device)
    return (pairs << shifts[:, None, None]).sum(-3).to(torch.uint8)


def _unpack_pairs(vectors: Tensor) -> Tensor:
    """Returns [..., 8 chunks, 32] of 2 bits of [..., 2, 32]."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=vectors.device)
    pairs = (vectors[..., None, :, :] >> shifts[:, None, None]) & 3
    return pairs.flatten(-3, -2)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Returns [..., 8 chunks, 32] uint8 of [..., bytes]."""
    vectors: Tensor = packed.unflatten(-1, (bits, 32))
    if bits == 8:
        return (vectors.view(torch.int8).to(torch.int16) + 128).to(torch.uint8)
    if bits >= 4:
        low = vectors[..., :4, :]
        chunks = torch.cat([low & 15, low >> 4], dim=-2)
    else:
        chunks = _unpack_pairs(vectors[..., :2, :])
    if bits in (3, 5):
        places = torch.arange(8, dtype=torch.uint8, device=packed.device)[:, None]
        chunks = chunks | (((vectors[..., -1:, :] >> places) & 1) << (bits - 1))
    if bits == 6:
        chunks = chunks | (_unpack_pairs(vectors[..., 4:, :]) << 4)
    return chunks


def to_lanes(values: Tensor) -> Tensor:
    """Rearranges [N, G] to [⌈N/8⌉, G, 8], padded with zeros."""
    filled = F.pad(values, (0, 0, 0, -len(values) % OUTPUTS))
    return filled.view(-1, OUTPUTS, values.shape[1]).transpose(1, 2).contiguous()


def from_lanes(lanes: Tensor) -> Tensor:
    """Rearranges [N/8, G, 8] to [N, G]."""
    return lanes.transpose(1, 2).flatten(0, 1)


__all__ = [
    "BITS",
    "MINIMA",
    "NONE",
    "ZEROS",
    "Grid",
    "GroupedMatrix",
    "from_chunks",
    "from_lanes",
    "pack",
    "pack_codes",
    "to_chunks",
    "to_lanes",
    "unpack_codes",
    "unsupported_reason",
]
