"""Converting a quantized model to another file format, without rounding any weight again."""

from pathlib import Path

import torch

from easyllm.core.device import parse_dtype
from easyllm.core.errors import ConfigError, suggest
from easyllm.core.manifest import MANIFEST_FILE, Manifest, hash_path
from easyllm.models import locate, open_source, save_model
from easyllm.models.full_weights import to_full_weights
from easyllm.models.gguf_export import FULL as GGUF_FULL
from easyllm.models.gguf_export import save_gguf
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Linear, set_full_weight
from easyllm.nn.storage import WeightStorage
from easyllm.pipeline.quantize_options import GGUF_TYPES
from easyllm.quant import KEPT
from easyllm.quant.formats import UNIFORM, UniformLayout
from easyllm.quant.gguf_weight import GGUFWeight
from easyllm.quant.quant_tensor import QuantTensor
from easyllm.quant.spec import QuantSpec
from easyllm.quant.uniform_weight import UniformWeight

FULL = "full"
SYMMETRIC = {"q4_0": 4, "q8_0": 8}
"""GGUF types that are symmetric grids with groups of 32, and their bits."""


def targets() -> list[str]:
    """Returns the formats that a quantized model can be converted to."""
    return [FULL, *UNIFORM]


@torch.no_grad()
def relayout(source: str, folder: Path, to: str, dtype: str | None = None) -> Path:
    """Writes a quantized model in another format; codes, scales and zero points stay the same.

    Args:
        source: the model's source.
        folder: the folder to write.
        to: `full` for dequantized weights, or the name of a format.
        dtype: dtype of full weights; None is fp32 for those that are dequantized and for GGUF
            files, otherwise that of the file.

    Raises:
        ConfigError: the format is not known, or cannot hold a weight as it is.
    """
    if to not in targets():
        raise ConfigError(
            f"format {to!r} is not known{suggest(to, targets())}; use {', '.join(targets())}"
        )
    opened = open_source(source)
    kept = opened.keeps_blocks()
    if to != FULL and opened.packed is None and not kept:
        raise ConfigError(
            f"the weights of {opened.path} are not quantized; quantize them with easyllm quantize "
            f"--format {to}"
        )
    wanted = None if dtype is None else parse_dtype(dtype)
    if wanted is None and to == FULL:
        wanted = torch.float32
    keep = KEPT if kept and to != FULL else None
    model = opened.model(wanted, torch.device("cpu"), quantize=keep)
    if to == FULL:
        to_full_weights(model)
    else:
        _store(model, UNIFORM[to])
    manifest = Manifest.create(
        "convert",
        config={"model": source, "to": to, "dtype": dtype},
        inputs={"model": hash_path(locate(source))},
    )
    return save_model(
        model,
        folder,
        tokenizer=opened.tokenizer(),
        extra_files={MANIFEST_FILE: manifest.model_dump(mode="json")},
    )


def to_gguf(source: str, path: Path, type: str | None = None) -> Path:
    """Writes a model as a GGUF file with full weights.

    Args:
        source: the model's source; quantized weights are dequantized.
        path: the file.
        type: f32, f16 or bf16; None is f16.

    Raises:
        ConfigError: the type is another.
    """
    kind = type or "f16"
    if kind not in GGUF_TYPES:
        raise ConfigError(
            f"there is no GGUF type {kind!r}{suggest(kind, GGUF_TYPES)}; use "
            f"{' or '.join(GGUF_FULL)}"
        )
    if kind not in GGUF_FULL:
        raise ConfigError(
            f"type {kind!r} rounds weights; use easyllm quantize --type {kind}, or convert to "
            f"{' or '.join(GGUF_FULL)}"
        )
    opened = open_source(source)
    model = to_full_weights(opened.model(torch.float32, torch.device("cpu")))
    if kind == "f16":
        half = torch.finfo(torch.float16).max
        for name, parameter in model.named_parameters():
            if not bool(parameter.abs().amax() <= half):
                raise ConfigError(
                    f"{name} of {opened.path} has values that float16 cannot hold; use bf16 or f32"
                )
    return save_gguf(model, path, type=kind, tokenizer=opened.tokenizer()).path


def _store(model: Decoder, layout: UniformLayout) -> None:
    """Stores quantized linears in a layout, and other quantized weights as full ones."""
    for name, layer in model.weight_modules():
        storage = layer.storage
        if storage.format == "dense":
            continue
        if not isinstance(layer, Linear) or layer is model.lm_head:
            set_full_weight(layer, storage.dense())
            continue
        weight = _quant_tensor(storage)
        if weight is None:
            reason: str | None = f"it is stored as {storage.format}, which is not a uniform grid"
        else:
            outputs, inputs = weight.shape
            reason = layout.unsupported_reason(weight.spec, outputs, inputs)
            if weight.group_of is not None and not layout.holds_order:
                reason = "its inputs were moved between groups (activation order)"
        if weight is None or reason is not None:
            raise ConfigError(
                f"{name} cannot be converted to {layout.name} without rounding it again: {reason}; "
                "convert it with --to full, or round it again with easyllm quantize --dequantize"
            )
        layer.store(layout.storage(weight, storage.dtype))


def _quant_tensor(storage: WeightStorage) -> QuantTensor | None:
    """Returns a quantized weight as codes on a uniform grid; None if it is on no such grid."""
    if isinstance(storage, UniformWeight):
        return storage.quant_tensor()
    if not isinstance(storage, GGUFWeight) or storage.kind not in SYMMETRIC:
        return None
    matrix = storage.matrix
    assert matrix is not None, "the kernels support these types"
    codes, scales, zeros = matrix.unpack()  # type: ignore[misc]
    return QuantTensor(
        codes=codes,
        scales=scales,
        zeros=zeros.to(torch.uint8),
        spec=QuantSpec(bits=SYMMETRIC[storage.kind], group_size=32),
    )


__all__ = ["relayout", "targets", "to_gguf"]
