"""Weights stored as NF4 or FP4, with or without double quantization."""

from collections.abc import Mapping

import torch
from torch import Tensor

from easyllm.nn.storage import PackedStorage
from easyllm.ops.blockwise4 import Blockwise4, blockwise4_linear, dequantize


class Blockwise4Weight(PackedStorage):
    """A weight in blocks of 4-bit codes.

    Args:
        matrix: the weight [N, K].
        dtype: dtype of looked-up rows and of the dequantized weight.
        format: name of the format; the codebook is a property of `matrix`.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(self, matrix: Blockwise4, dtype: torch.dtype, format: str) -> None:
        super().__init__((matrix.outputs, matrix.inputs), dtype)
        self.format, self.codebook = format, matrix.codebook
        self.register_buffer("codes", matrix.codes)
        self.register_buffer("absmax", matrix.absmax)
        self.register_buffer("nested_absmax", matrix.nested_absmax)
        self.register_buffer("nested_offset", matrix.nested_offset)

    @property
    def matrix(self) -> Blockwise4:
        """The quantized weight [N, K]."""
        nested = self.nested_absmax, self.nested_offset
        return Blockwise4(self.codes, self.absmax, *nested, self.codebook, *self.shape)

    def linear(
        self, x: Tensor, bias: Tensor | None = None, *, deterministic: bool = False
    ) -> Tensor:
        """Returns x Wᵀ + b, [..., N] in the dtype of `x: [..., K]`."""
        return blockwise4_linear(x, self.matrix, bias, deterministic=deterministic)

    def dense(self) -> Tensor:
        """Returns the dequantized weight [N, K]."""
        return dequantize(self.matrix, self.dtype)

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns codes and scales, and with double quantization the nested scales and offset."""
        return {name: t for name, t in self.named_buffers() if name != "like"}

    @property
    def payload(self) -> Tensor:
        """The codes."""
        return self.codes

    @payload.setter
    def payload(self, value: Tensor) -> None:
        self.codes = value


__all__ = ["Blockwise4Weight"]
