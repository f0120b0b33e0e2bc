"""Layouts of quantized weights on disk: one file each, which registers its storage format."""

from easyllm.quant.formats import awq, compressed_tensors, gptq

__all__ = ["awq", "compressed_tensors", "gptq"]
