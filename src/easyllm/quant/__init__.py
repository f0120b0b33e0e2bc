"""Quantization: schemes, and weights replaced by codes."""

from easyllm.quant.spec import QuantSpec
from easyllm.quant.weight_only import (
    SCHEMES,
    quantizable,
    quantize_weight,
    quantize_weights,
    weight_bytes,
)

__all__ = [
    "SCHEMES",
    "QuantSpec",
    "quantizable",
    "quantize_weight",
    "quantize_weights",
    "weight_bytes",
]
