"""Weight quantization: storage formats, and replacing a model's weights by quantized codes."""

from easyllm.quant import formats
from easyllm.quant.blockwise4 import quantize_blockwise4
from easyllm.quant.registry import (
    FORMATS,
    KEPT,
    LAYOUTS,
    FileLayout,
    StorageFormat,
    check_scheme,
    find_scheme,
    format_of_checkpoint,
    is_cacheable,
    register_layout,
    register_storage,
    schemes,
)
from easyllm.quant.spec import QuantSpec
from easyllm.quant.weight_only import (
    PackedLayers,
    plan_packed,
    quantizable,
    quantize_weight,
    quantize_weights,
    weight_bytes,
)

__all__ = [
    "FORMATS",
    "KEPT",
    "LAYOUTS",
    "FileLayout",
    "PackedLayers",
    "QuantSpec",
    "StorageFormat",
    "check_scheme",
    "find_scheme",
    "format_of_checkpoint",
    "formats",
    "is_cacheable",
    "plan_packed",
    "quantizable",
    "quantize_blockwise4",
    "quantize_weight",
    "quantize_weights",
    "register_layout",
    "register_storage",
    "schemes",
    "weight_bytes",
]
