"""Quantization: schemes, and weights replaced by codes."""

from easyllm.quant.spec import QuantSpec
from easyllm.quant.weight_only import SCHEMES, quantize_weights

__all__ = ["SCHEMES", "QuantSpec", "quantize_weights"]
