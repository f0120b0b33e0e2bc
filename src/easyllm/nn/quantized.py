"""A quantized weight in the place of a full one."""

import torch
from torch import Tensor, nn

from easyllm.ops.quantized_linear import (
    QuantizedMatrix,
    dequantize,
    dequantize_rows,
    quantized_linear,
)


class QuantizedWeight(nn.Module):
    """Fills the `quantized` slot of a `Linear` or an `Embedding`.

    Args:
        matrix: the weight [N, K].
    """

    data: Tensor
    scale_bytes: Tensor | None

    def __init__(self, matrix: QuantizedMatrix) -> None:
        super().__init__()
        self.outputs, self.inputs = matrix.outputs, matrix.inputs
        self.register_buffer("data", matrix.data)
        # as bytes, so that a change of the model's dtype does not round them
        scales = None if matrix.scales is None else matrix.scales.view(torch.uint8)
        self.register_buffer("scale_bytes", scales)

    @property
    def matrix(self) -> QuantizedMatrix:
        scales = None if self.scale_bytes is None else self.scale_bytes.view(torch.float32)
        return QuantizedMatrix(self.data, scales, self.outputs, self.inputs)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x: [..., K]` → [..., N], in the dtype of `x`."""
        return quantized_linear(x, self.matrix, bias)

    def rows(self, token_ids: Tensor) -> Tensor:
        """[T, K] fp32: the rows of `token_ids: [T]`."""
        return dequantize_rows(self.matrix, token_ids)

    def dequantize(self) -> Tensor:
        """[N, K] fp32."""
        return dequantize(self.matrix)

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outputs}, int{self.matrix.bits}"
