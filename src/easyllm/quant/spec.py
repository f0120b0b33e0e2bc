"""Quantization parameters of a weight (bits, group size, symmetry), independent of its layout."""

from typing import Literal

import torch
from pydantic import Field, PositiveInt

from easyllm.core.config import Config
from easyllm.core.device import parse_dtype


class QuantSpec(Config):
    """Uniform quantization of a weight [N, K]: w ≈ scale · (code − zero)."""

    bits: Literal[2, 3, 4, 8] = Field(description="Bits per code.")
    group_size: PositiveInt | Literal["tensor"] | None = Field(
        default=None,
        description="Number of inputs (along K) that share a scale; null is one scale per output "
        "row (per-channel), `tensor` one for the whole weight.",
    )
    symmetric: bool = Field(
        default=True,
        description="Whether the zero point is the middle code and the range ±max|w|; otherwise "
        "the codes span min to max (asymmetric).",
    )
    scale_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        default="float16",
        description="Dtype that scales are rounded to before the codes are computed, so that a "
        "file in that dtype stores exactly the quantized weight.",
    )

    activations: bool = Field(
        default=False,
        description="Whether inputs are quantized to 8 bits, too, token by token while the model "
        "runs (W8A8).",
    )

    @property
    def levels(self) -> int:
        """The largest code, 2^bits − 1."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid, 2^(bits − 1)."""
        return 1 << (self.bits - 1)

    def group(self, inputs: int) -> int:
        """Returns the number of inputs that share a scale in a weight with K inputs."""
        return self.group_size if isinstance(self.group_size, int) else inputs

    def unsupported_reason(self, inputs: int) -> str | None:
        """Returns why a weight with K inputs cannot be quantized; None if it can."""
        group = self.group(inputs)
        if inputs % group == 0:
            return None
        fitting = [size for size in (16, 32, 64, 128, 256) if inputs % size == 0]
        listed = ", ".join(map(str, fitting)) or "one scale per row"
        return f"a group size of {group} does not divide {inputs} inputs (those that do: {listed})"

    def bits_per_weight(self, inputs: int) -> float:
        """Returns the bits per weight, scales and zero points counted (zero points: `bits` each).

        >>> QuantSpec(bits=4, group_size=128).bits_per_weight(4096)
        4.125
        """
        if self.group_size == "tensor":
            return float(self.bits)
        each = 8 * parse_dtype(self.scale_dtype).itemsize + (0 if self.symmetric else self.bits)
        return self.bits + each / self.group(inputs)

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """The dtype of scales."""
        return parse_dtype(self.scale_dtype)


__all__ = ["QuantSpec"]
