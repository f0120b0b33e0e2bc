"""Storage of a weight in GGUF's blocks, as a file stores them.

Q8_0 ... Q4_0 and Q6_K ... Q4_K go into the layout of the CPU kernels, with the same codes, scales
and minima. Other types keep their bytes and are dequantized for a product.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from easyllm.nn.storage import PackedStorage
from easyllm.ops.grouped_linear import MINIMA, NONE, OUTPUTS, Grid, GroupedMatrix, pack
from easyllm.ops.kernels.structs import Matrix
from easyllm.ops.packed_linear import packed_linear
from easyllm.ops.super_blocks import GROUPS, SuperBlocks, SuperMatrix, pack_super
from easyllm.quant.gguf_blocks import BLOCK, TYPES
from easyllm.quant.registry import StorageFormat

BITS = {"q4_0": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5, "q8_0": 8}
"""Types of 32 weights a block that the kernels multiply by, and the bits of their codes."""
SUPER_BITS = {"q4_k": 4, "q5_k": 5, "q6_k": 6}
"""The same for types of 256 weights a block."""


class GGUFWeight(PackedStorage):
    """A weight [N, K] in blocks of a GGUF type.

    Args:
        raw: the file's bytes, uint8 [N, K / block · bytes].
        type: the type's name in lower case.
        shape: (N, K).
        dtype: dtype of looked-up rows and of the dequantized weight.
    """

    data: Tensor

    def __init__(self, raw: Tensor, type: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self.format, self.kind = f"gguf-{type}", type
        self.rounds_rows = type in BITS or type in SUPER_BITS
        if type in BITS:
            raw = _repacked(raw, type, shape).data
        elif type in SUPER_BITS:
            raw = pack_super(_super_blocks(raw, type), SUPER_BITS[type]).data
        self.register_buffer("data", raw.contiguous())

    @property
    def matrix(self) -> GroupedMatrix | SuperMatrix | None:
        """The weight in the layout of the kernels; None for types that they do not support."""
        return self._matrix(self.data, self.shape[0])

    def _matrix(self, data: Tensor, outputs: int) -> GroupedMatrix | SuperMatrix | None:
        inputs = self.shape[1]
        if self.kind in BITS:
            return GroupedMatrix(data, grid_of(self.kind), outputs, inputs)
        if self.kind in SUPER_BITS:
            return SuperMatrix(data, SUPER_BITS[self.kind], outputs, inputs)
        return None

    def linear(
        self, x: Tensor, bias: Tensor | None = None, *, deterministic: bool = False
    ) -> Tensor:
        """Returns x Wᵀ + b, [..., N] in the dtype of `x: [..., K]`; always batch-invariant."""
        matrix = self.matrix
        if matrix is None:
            return super().linear(x, bias, deterministic=deterministic)
        return packed_linear(x, matrix, bias, deterministic=deterministic)

    def rows(self, token_ids: Tensor) -> Tensor:
        """Returns the dequantized rows [T, K] of `token_ids: [T]`."""
        if self.matrix is None:
            return _dequantized(self.data[token_ids], self.kind).to(self.dtype)
        blocks = self.data[token_ids // OUTPUTS]  # each row with the seven others of its block
        matrix = self._matrix(blocks, len(token_ids) * OUTPUTS)
        assert matrix is not None, "its kind has one"
        places = torch.arange(len(token_ids), device=token_ids.device) * OUTPUTS
        return matrix.dequantize()[places + token_ids % OUTPUTS].to(self.dtype)

    def dense(self) -> Tensor:
        """Returns the dequantized weight [N, K]."""
        matrix = self.matrix
        values = _dequantized(self.data, self.kind) if matrix is None else matrix.dequantize()
        return values.to(self.dtype)

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns the packed data."""
        return {"data": self.data}

    def kernel_matrix(self, bias: Tensor | None) -> Matrix | None:
        """Returns the weight in the format of the C kernels; None for types they do not support."""
        return None if self.matrix is None else self.matrix.struct(bias)


def gguf_format(type: str) -> StorageFormat:
    """Returns the format of weights in blocks of a type; it is neither written nor read alone."""
    import gguf

    block, num_bytes = gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, type.upper())]
    # the kernels' layout has 8 bits for scales of 6 bits, and whole blocks of 8 outputs
    more = 4 if type in ("q4_k", "q5_k") else 0

    def size(shape: tuple[int, int]) -> int:
        outputs = -(-shape[0] // OUTPUTS) * OUTPUTS
        return outputs * (shape[1] // int(block)) * (int(num_bytes) + more)

    return StorageFormat(name=f"gguf-{type}", num_bytes=size)


def grid_of(type: str) -> Grid:
    """Returns the grid of a type with 32 weights a block."""
    shift = MINIMA if type in ("q4_1", "q5_1") else NONE
    return Grid(bits=BITS[type], scale_dtype=torch.float16, shift=shift, group_size=BLOCK)


def _dequantized(raw: Tensor, type: str) -> Tensor:
    """Returns [N, K] fp32 of a file's bytes [N, bytes]."""
    import gguf

    kind = getattr(gguf.GGMLQuantizationType, type.upper())
    values = gguf.quants.dequantize(raw.cpu().numpy(), kind)
    return torch.from_numpy(values).to(raw.device)


def _halves(blocks: Tensor, first: int) -> Tensor:
    """Returns the fp16 value at byte `first` of each block."""
    return blocks[..., first : first + 2].contiguous().view(torch.float16).squeeze(-1)


def _repacked(raw: Tensor, type: str, shape: tuple[int, int]) -> GroupedMatrix:
    """Returns blocks of 32 weights in the layout of the kernels."""
    grid = grid_of(type)
    blocks = raw.reshape(shape[0], -1, TYPES[type].num_bytes)  # [N, G, bytes]
    at, minima = 2, None
    if grid.shift == MINIMA:
        minima, at = _halves(blocks, 2).float(), 4
    if grid.bits == 8:
        codes = (blocks[..., at:].view(torch.int8).to(torch.int16) + 128).to(torch.uint8)
    else:
        high = None
        if grid.bits == 5:
            places = torch.arange(8, dtype=torch.uint8, device=raw.device)
            bits = (blocks[..., at : at + 4, None] >> places) & 1
            high, at = bits.flatten(-2), at + 4
        nibbles = blocks[..., at:]
        codes = torch.cat([nibbles & 15, nibbles >> 4], dim=-1)
        codes = codes if high is None else codes | (high << 4)
    return pack(codes.reshape(shape), _halves(blocks, 0).float(), minima, grid)


def _super_blocks(raw: Tensor, type: str) -> SuperBlocks:
    """Returns the parts of blocks of 256 weights (GGML's layouts, see `gguf_blocks`)."""
    blocks = raw.reshape(len(raw), -1, TYPES[type].num_bytes)  # [N, S, bytes]
    if type == "q6_k":
        return _six_bit_blocks(blocks)
    s = blocks[..., 4:16].unflatten(-1, (3, 4))
    a = torch.cat([s[..., 0, :] & 63, (s[..., 2, :] & 15) | ((s[..., 0, :] >> 6) << 4)], -1)
    b = torch.cat([s[..., 1, :] & 63, (s[..., 2, :] >> 4) | ((s[..., 1, :] >> 6) << 4)], -1)
    nibbles = blocks[..., -128:].unflatten(-1, (4, 1, 32))
    codes = torch.cat([nibbles & 15, nibbles >> 4], dim=-2).flatten(-3, -2)  # [N, S, 8, 32]
    if type == "q5_k":
        places = torch.arange(GROUPS, dtype=torch.uint8, device=raw.device)[:, None]
        codes = codes | (((blocks[..., None, 16:48] >> places) & 1) << 4)
    return SuperBlocks(
        codes=codes.flatten(1),
        parts=torch.stack([a, b], dim=-1).flatten(1, 2),
        scales=_halves(blocks, 0),
        minima=_halves(blocks, 2),
    )


def _six_bit_blocks(blocks: Tensor) -> SuperBlocks:
    low = blocks[..., :128].unflatten(-1, (2, 2, 32))  # halves, quarters 0 and 1 below 2 and 3
    low = torch.cat([low & 15, low >> 4], dim=-2)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts) & 3
    return SuperBlocks(
        codes=(low | (high << 4)).flatten(1),
        parts=blocks[..., 192:208].unflatten(-1, (GROUPS, 2)).flatten(1, 2).contiguous(),
        scales=_halves(blocks, 208),
        minima=None,
    )


__all__ = ["BITS", "SUPER_BITS", "GGUFWeight", "gguf_format", "grid_of"]
