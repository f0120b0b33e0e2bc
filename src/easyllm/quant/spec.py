"""Quantization parameters of a weight (bits, group size, symmetry), independent of its layout."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from easyllm.core.config import Config


class QuantSpec(Config):
    """Round-to-nearest quantization of a weight [N, K]."""

    bits: Literal[4, 8] = Field(description="Bits per code.")
    group_size: PositiveInt | None = Field(
        default=None,
        description="Number of inputs (along K) that share a scale; null is one scale per output "
        "row (per-channel).",
    )
    symmetric: bool = Field(
        default=True,
        description="Whether zero is a code and the range is ±max|w|; otherwise the codes span min "
        "to max (asymmetric, with an offset).",
    )

    @model_validator(mode="after")
    def _is_served(self) -> "QuantSpec":
        served = [(8, None, True), (4, 32, False)]
        if (self.bits, self.group_size, self.symmetric) not in served:
            raise ValueError(
                f"bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric} is "
                "not supported; use 8 bits, group_size=None, symmetric, or 4 bits, group_size=32, "
                "asymmetric"
            )
        return self
