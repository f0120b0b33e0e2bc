"""Quantized weights (int8 or int4) in the layout of the C kernels."""

from collections.abc import Mapping

import torch
from torch import Tensor

from easyllm.nn.storage import PackedStorage
from easyllm.ops.kernels.structs import Matrix
from easyllm.ops.packed_linear import packed_linear
from easyllm.ops.quantized_linear import QuantizedMatrix, dequantize_rows


class QuantizedWeight(PackedStorage):
    """An int8 weight (per-channel scales) or an int4 weight (scale and zero point, group size 32).

    Args:
        matrix: the weight [N, K].
        dtype: dtype of looked-up rows and of the dequantized weight.
    """

    rounds_rows = True
    data: Tensor
    scales: Tensor | None

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        super().__init__((matrix.outputs, matrix.inputs), dtype)
        self.format = f"int{matrix.bits}"
        self.register_buffer("data", matrix.data)
        self.register_buffer("scales", matrix.scales)

    @property
    def matrix(self) -> QuantizedMatrix:
        """The quantized weight [N, K]."""
        return QuantizedMatrix(self.data, self.scales, *self.shape)

    def linear(
        self, x: Tensor, bias: Tensor | None = None, *, deterministic: bool = False
    ) -> Tensor:
        """Returns x Wᵀ + b, [..., N] in the dtype of `x: [..., K]`; always batch-invariant."""
        return packed_linear(x, self.matrix, bias, deterministic=deterministic)

    def rows(self, token_ids: Tensor) -> Tensor:
        """Returns the dequantized rows [T, K] of `token_ids: [T]`."""
        if self.scales is None:
            return super().rows(token_ids)
        return dequantize_rows(self.matrix, token_ids).to(self.dtype)

    def dense(self) -> Tensor:
        """Returns the dequantized weight [N, K]."""
        return self.matrix.dequantize().to(self.dtype)

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns the data and, if there are any, the scales."""
        held = {"data": self.data, "scales": self.scales}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def kernel_matrix(self, bias: Tensor | None) -> Matrix | None:
        """Returns the weight in the format of the C kernels."""
        return self.matrix.struct(bias)

    @property
    def payload(self) -> Tensor:
        """The quantized data."""
        return self.data

    @payload.setter
    def payload(self, value: Tensor) -> None:
        self.data = value
