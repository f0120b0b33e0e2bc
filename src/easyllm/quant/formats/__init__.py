"""Layouts of quantized weights on disk: one file each, which registers it."""

from easyllm.quant.formats import awq, bitsandbytes, compressed_tensors, gptq
from easyllm.quant.formats.layout import UniformLayout

UNIFORM: dict[str, UniformLayout] = {
    layout.name: layout for layout in (gptq.LAYOUT, awq.LAYOUT, compressed_tensors.LAYOUT)
}
"""The layouts of uniform grids by name."""

__all__ = ["UNIFORM", "UniformLayout", "awq", "bitsandbytes", "compressed_tensors", "gptq"]
