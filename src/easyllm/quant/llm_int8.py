"""LLM.int8(): weights in int8, and inputs with outliers in full precision.

(Dettmers et al. 2022, arXiv 2208.07339.) A few input channels of large models are much larger than
the others; quantized together with them, the others lose all precision. Values of at least the
threshold are therefore multiplied by the dequantized weight, all others as int8:

    y = (x − x_out) W_int8ᵀ + x_out Wᵀ         w = code · SCB / 127, SCB = max|w| of an output row

The paper takes whole columns in which any row of a batch has an outlier; here each value counts by
itself, so that a row's result does not depend on other rows, and no more than that is rounded.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from easyllm.nn.storage import PackedStorage
from easyllm.ops.packed_linear import packed_linear
from easyllm.ops.quantized_linear import QuantizedMatrix, dequantize_rows, pack_int8
from easyllm.quant.registry import StorageFormat, register_storage

NAME = "llm.int8"
THRESHOLD = 6.0


class Int8Weight(PackedStorage):
    """A weight [N, K] in int8.

    Args:
        matrix: the codes [N, K] with the scales `scb` / 127.
        scb: max|w| of each output row, [N] fp32.
        threshold: inputs of at least this magnitude are not quantized; 0 quantizes all.
        dtype: dtype of looked-up rows and of the dequantized weight.
    """

    format = NAME
    rounds_rows = True
    data: Tensor
    scales: Tensor
    scb: Tensor

    def __init__(
        self, matrix: QuantizedMatrix, scb: Tensor, threshold: float, dtype: torch.dtype
    ) -> None:
        super().__init__((matrix.outputs, matrix.inputs), dtype)
        self.threshold = threshold
        self.register_buffer("data", matrix.data)
        self.register_buffer("scales", matrix.scales)
        self.register_buffer("scb", scb)

    @classmethod
    def pack(cls, codes: Tensor, scb: Tensor, threshold: float, dtype: torch.dtype) -> "Int8Weight":
        """Returns the storage of int8 `codes: [N, K]`; other arguments as for the class."""
        return cls(pack_int8(codes, scb / 127), scb, threshold, dtype)

    @property
    def matrix(self) -> QuantizedMatrix:
        """The quantized weight [N, K]."""
        return QuantizedMatrix(self.data, self.scales, *self.shape)

    def linear(
        self, x: Tensor, bias: Tensor | None = None, *, deterministic: bool = False
    ) -> Tensor:
        """Returns x Wᵀ + b, [..., N] in the dtype of `x: [..., K]`."""
        if deterministic:
            return super().linear(x, bias, deterministic=True)
        outliers = x.detach().abs() >= self.threshold
        if self.threshold <= 0 or not bool(outliers.any()):
            return packed_linear(x, self.matrix, bias)
        y = packed_linear(x.masked_fill(outliers, 0), self.matrix, bias)
        columns = outliers.flatten(0, -2).any(0).nonzero().squeeze(1)
        large = torch.where(outliers, x, torch.zeros_like(x))[..., columns]
        return y + large @ self._columns(columns).to(x.dtype).T

    def _columns(self, columns: Tensor) -> Tensor:
        """Returns the dequantized columns [N, C] of `columns: [C]`, fp32."""
        chunks = self.data.view(len(self.data), -1, 8, 8, 4)  # [N/8, K/32, chunk, output, input]
        found = chunks[:, columns // 32, columns % 32 // 4, :, columns % 4]  # [C, N/8, 8]
        codes = found.flatten(1).T[: self.shape[0]].float()
        return codes * self.scales[: self.shape[0], None]

    def rows(self, token_ids: Tensor) -> Tensor:
        """Returns the dequantized rows [T, K] of `token_ids: [T]`."""
        return dequantize_rows(self.matrix, token_ids).to(self.dtype)

    def dense(self) -> Tensor:
        """Returns the dequantized weight [N, K]."""
        return self.matrix.dequantize().to(self.dtype)

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns the file's tensors, by the last part of their names."""
        chunks = self.data.view(len(self.data), -1, 8, 8, 4)
        codes = chunks.permute(0, 3, 1, 2, 4).reshape(len(self.data) * 8, -1)
        return {
            "weight": codes[: self.shape[0], : self.shape[1]].contiguous(),
            "SCB": self.scb,
        }


def quantize_int8(weight: Tensor, threshold: float = THRESHOLD) -> Int8Weight:
    """Quantizes a finite `weight: [N, K]`; a row of zeros has the scale 0."""
    scb = weight.float().abs().amax(1)
    codes = weight.float() * (127 / scb.clamp(min=1e-38))[:, None]
    return Int8Weight.pack(codes.round_().to(torch.int8), scb, threshold, weight.dtype)


def _from_buffers(buffers: Mapping[str, Tensor], shape: tuple[int, int]) -> Int8Weight:
    matrix = QuantizedMatrix(buffers["data"], buffers["scales"], *shape)
    return Int8Weight(matrix, buffers["scb"], THRESHOLD, buffers["like"].dtype)


register_storage(
    StorageFormat(
        name=NAME,
        num_bytes=lambda shape: (
            -(-shape[0] // 8) * 8 * (-(-shape[1] // 32) * 32 + 4) + 4 * shape[0]
        ),
        quantize=lambda weight, _: quantize_int8(weight),
        from_buffers=_from_buffers,
        layout="bitsandbytes",
    )
)

__all__ = ["NAME", "THRESHOLD", "Int8Weight", "quantize_int8"]
