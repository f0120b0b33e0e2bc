"""A weight of 8 or 4 bits in the layout of the C kernels."""

from collections.abc import Mapping

import torch
from torch import Tensor

from easyllm.nn.storage import PackedStorage
from easyllm.ops.kernels.build import Matrix
from easyllm.ops.quantized_linear import (
    QuantizedMatrix,
    dequantize,
    dequantize_rows,
    matrix_struct,
    quantized_linear,
)


class QuantizedWeight(PackedStorage):
    """int8 (a scale for each output) or int4 (a scale and an offset for each 32 inputs).

    Args:
        matrix: the weight [N, K].
        dtype: of looked-up rows.
    """

    data: Tensor
    scales: Tensor | None

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        super().__init__((matrix.outputs, matrix.inputs), dtype)
        self.format = f"int{matrix.bits}"
        self.register_buffer("data", matrix.data)
        self.register_buffer("scales", matrix.scales)

    @property
    def matrix(self) -> QuantizedMatrix:
        return QuantizedMatrix(self.data, self.scales, *self.shape)

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        deterministic: bool = False,  # noqa: ARG002 - its products always are
    ) -> Tensor:
        """`x: [..., K]` → [..., N] in the dtype of `x`; a row's bits never depend on the other rows."""
        return quantized_linear(x, self.matrix, bias)

    def rows(self, token_ids: Tensor) -> Tensor:
        if self.scales is None:
            return super().rows(token_ids)
        return dequantize_rows(self.matrix, token_ids).to(self.dtype)

    def dense(self) -> Tensor:
        return dequantize(self.matrix).to(self.dtype)

    def tensors(self) -> Mapping[str, Tensor]:
        held = {"data": self.data, "scales": self.scales}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def kernel_matrix(self, bias: Tensor | None) -> Matrix | None:
        return matrix_struct(self.matrix, bias)

    @property
    def payload(self) -> Tensor:
        return self.data

    @payload.setter
    def payload(self, value: Tensor) -> None:
        self.data = value
