"""Storage of a weight in GGUF's blocks, as a file stores them.

Blocks of 32 weights go into the layout of the CPU kernels, with the same codes, scales and minima.
K-quants keep their bytes and are dequantized for a product.
"""

from collections.abc import Mapping

import gguf
import torch
from torch import Tensor

from easyllm.nn.storage import PackedStorage
from easyllm.ops.grouped_linear import (
    MINIMA,
    NONE,
    Grid,
    GroupedMatrix,
    pack,
)
from easyllm.ops.kernels.structs import Matrix
from easyllm.ops.packed_linear import packed_linear
from easyllm.quant.gguf_blocks import BLOCK, TYPES

BITS = {"q4_0": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5, "q8_0": 8}
"""Types that the kernels multiply by, and the bits of their codes."""


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
        self.grid = grid_of(type)
        stored = raw if self.grid is None else repacked(raw, type, shape, self.grid).data
        self.register_buffer("data", stored)

    @property
    def matrix(self) -> GroupedMatrix | None:
        """The weight in the layout of the kernels; None for K-quants."""
        return None if self.grid is None else GroupedMatrix(self.data, self.grid, *self.shape)

    def linear(
        self, x: Tensor, bias: Tensor | None = None, *, deterministic: bool = False
    ) -> Tensor:
        """Returns x Wᵀ + b, [..., N] in the dtype of `x: [..., K]`; always batch-invariant."""
        matrix = self.matrix
        if matrix is None:
            return super().linear(x, bias, deterministic=deterministic)
        return packed_linear(x, matrix, bias)

    def dense(self) -> Tensor:
        """Returns the dequantized weight [N, K]."""
        if self.matrix is not None:
            return self.matrix.dequantize().to(self.dtype)
        kind = getattr(gguf.GGMLQuantizationType, self.kind.upper())
        values = gguf.quants.dequantize(self.data.cpu().numpy(), kind)
        return torch.from_numpy(values).view(self.shape).to(self.device, self.dtype)

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns the packed data."""
        return {"data": self.data}

    def kernel_matrix(self, bias: Tensor | None) -> Matrix | None:
        """Returns the weight in the format of the C kernels; None for K-quants."""
        return None if self.matrix is None else self.matrix.struct(bias)


def grid_of(type: str) -> Grid | None:
    """Returns the grid of a type that the kernels support; None for others."""
    if type not in BITS:
        return None
    shift = MINIMA if type in ("q4_1", "q5_1") else NONE
    return Grid(bits=BITS[type], scale_dtype=torch.float16, shift=shift, group_size=BLOCK)


def repacked(raw: Tensor, type: str, shape: tuple[int, int], grid: Grid) -> GroupedMatrix:
    """Returns blocks in the layout of the kernels."""
    blocks = raw.reshape(shape[0], -1, TYPES[type].num_bytes)  # [N, G, bytes]

    def halves(first: int) -> Tensor:
        return blocks[..., first : first + 2].contiguous().view(torch.float16).squeeze(-1).float()

    at = 2
    minima = None
    if grid.shift == MINIMA:
        minima, at = halves(2), 4
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
    return pack(codes.reshape(shape), halves(0), minima, grid)


__all__ = ["GGUFWeight", "grid_of"]
