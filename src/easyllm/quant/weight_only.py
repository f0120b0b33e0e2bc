"""Weight-only quantization of a loaded model to int8 or int4.

The CPU's kernels also quantize each row of activations, while they multiply
(`ops/packed_linear`).

int8 is symmetric with one scale per output channel. int4 is asymmetric with groups of 32 inputs:
its codes span the minimum to the maximum of a group, which recovers the original grid of a
checkpoint quantized the same way (GGUF's Q4_1). Embedding and head are int8 in both.
"""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError
from easyllm.core.finite import all_finite
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Embedding, Linear
from easyllm.nn.moe import ROUTERS
from easyllm.nn.quantized import QuantizedWeight
from easyllm.nn.storage import PackedStorage, WeightStorage
from easyllm.ops.quantized_linear import QuantizedMatrix, pack_int4, pack_int8, packed_bytes
from easyllm.quant.registry import StorageFormat, find_scheme, register_storage
from easyllm.quant.spec import QuantSpec

SCHEMES = {
    "int8": QuantSpec(bits=8),
    "int4": QuantSpec(bits=4, group_size=32, symmetric=False),
}
PackedLayers: TypeAlias = dict[str, tuple[Linear | Embedding, StorageFormat]]
"""Modules whose weights are quantized with their formats, by the name of the weight."""
ROWS = 1024
"""Output rows quantized at once, so that intermediate tensors fit into the CPU cache. A multiple
of the kernel's 8 rows."""


@torch.no_grad()
def quantize_weights(model: Decoder, scheme: str) -> Decoder:
    """Quantizes a model in place: every linear in the layers, and embedding and head.

    Embedding and head use the format given by `StorageFormat.table`. Each full-precision weight is
    freed as soon as it is quantized, so that the two models never exist at once;
    `load_model(..., quantize=)` quantizes while reading and never has more than one full-precision
    weight in memory. Adapters continue to work.

    Args:
        model: the model, not quantized.
        scheme: the name of a registered format: `"int8"`, `"int4"` ...

    Returns:
        The same model.

    Raises:
        ConfigError: the scheme is unknown; the model is already quantized; or a weight contains NaN
            or infinite values.

    Example:
        >>> from easyllm.models import load_model
        >>> quantize_weights(load_model("smollm2"), "int4")  # doctest: +SKIP
    """
    for name, (layer, format) in quantizable(model, scheme).items():
        layer.store(quantize_weight(layer.storage.dense(), format, name))
    return model


def quantizable(model: Decoder, scheme: str) -> PackedLayers:
    """Returns the modules that `scheme` quantizes with their formats, by the name of the weight.

    Raises:
        ConfigError: the scheme is unknown or does not support the shape of a weight, or the model
            is already quantized.
    """
    format = find_scheme(scheme)
    if packed := model.packed_formats():
        raise ConfigError(
            f"the model is already quantized ({', '.join(sorted(packed))}); load the unquantized "
            f"model to quantize it as {scheme}"
        )
    found: PackedLayers = {
        f"{name}.weight": (module, format)
        for name, module in model.layers.named_modules(prefix="layers")
        if isinstance(module, Linear) and not name.endswith(ROUTERS)
    }
    if format.table is not None:
        table = find_scheme(format.table)
        found["embed_tokens.weight"] = (model.embed_tokens, table)
        if model.lm_head is not None:
            found["lm_head.weight"] = (model.lm_head, table)
    for name, (layer, its) in found.items():
        reason = its.unsupported_reason(layer.storage.shape)
        if reason is not None:
            raise ConfigError(f"{name} cannot be stored as {its.name}: {reason}")
    return found


def plan_packed(packed: PackedLayers) -> None:
    """Gives modules on the meta device storages of their formats, without contents.

    Names, shapes and formats can then be checked without weights; the model cannot run.
    """
    for layer, format in packed.values():
        storage = PackedStorage(layer.storage.shape, layer.storage.dtype).to("meta")
        storage.format = format.name
        layer.store(storage)


def weight_bytes(
    model: Decoder,
    dtype: torch.dtype,
    scheme: str | None = None,
    *,
    packed: PackedLayers | None = None,
) -> int:
    """Returns the size in bytes of a model's weights.

    Args:
        model: the model, possibly on the meta device.
        dtype: dtype of the weights that are not quantized.
        scheme: quantization format; None for no quantization.
        packed: instead, the modules to be quantized and their formats.
    """
    if packed is None:
        packed = {} if scheme is None else quantizable(model, scheme)
    held = sum(
        packed[name][1].num_bytes((parameter.shape[0], parameter.shape[1]))
        if name in packed
        else parameter.numel() * dtype.itemsize
        for name, parameter in model.named_parameters()
    )
    return held + sum(
        layer.storage.num_bytes
        for _, layer in model.weight_modules()
        if layer.storage.format != "dense"
    )


def quantize_matrix(weight: Tensor, spec: QuantSpec) -> QuantizedMatrix:
    """Quantizes `weight: [N, K]` by rounding to the nearest codes of `spec`.

    The error |w - ŵ| is at most half the scale, s/2, where s = max|w| / 127 of the output row
    (int8) or s = (max - min) / 15 of the group (int4). For int4, rounding the scale s and the
    offset c (the value of code 8) to fp16 adds at most (8 s + |c|) 2^-11.
    """
    quantize = _int8 if spec.bits == 8 else _int4
    parts = [quantize(rows.float()) for rows in weight.split(ROWS)]
    scales = [part.scales for part in parts if part.scales is not None]
    return QuantizedMatrix(
        torch.cat([part.data for part in parts]),
        torch.cat(scales) if scales else None,
        *weight.shape,
    )


def _int8(weight: Tensor) -> QuantizedMatrix:
    scales = (weight.abs().amax(1) / 127).clamp(min=1e-30)
    return pack_int8((weight / scales[:, None]).round_().to(torch.int8), scales)


def _int4(weight: Tensor) -> QuantizedMatrix:
    outputs, inputs = weight.shape
    missing = -inputs % 32
    # pads a partial group with its last value, which does not widen its range
    last = weight[:, -1:].expand(-1, missing)
    groups = torch.cat([weight, last], dim=1).view(outputs, -1, 32)
    least, most = groups.aminmax(dim=2)
    # 2^-24 is the smallest positive fp16 number: a group of equal values has it as its scale, and
    # the value itself as its offset
    scales = ((most - least) / 15).to(torch.float16).clamp(min=2**-24)
    offsets = (least + 8 * scales.float()).to(torch.float16)
    codes = (groups - offsets[..., None].float()) / scales[..., None].float() + 8
    codes = codes.round_().clamp_(0, 15).to(torch.uint8).flatten(1)[:, :inputs]
    return pack_int4(codes, scales, offsets)


def quantize_weight(weight: Tensor, format: StorageFormat, name: str) -> WeightStorage:
    """Quantizes `weight: [N, K]` to `format`; `name` is used in error messages.

    Raises:
        ConfigError: the weight contains NaN or infinite values.
    """
    assert format.quantize is not None, "found by find_scheme"
    if not all_finite(weight):
        raise ConfigError(f"{name} contains NaN or infinite values; check the checkpoint")
    return format.quantize(weight, name)


def _from_buffers(buffers: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
    matrix = QuantizedMatrix(buffers["data"], buffers.get("scales"), *shape)
    return QuantizedWeight(matrix, buffers["like"].dtype)


def _register(name: str, spec: QuantSpec) -> None:
    register_storage(
        StorageFormat(
            name=name,
            num_bytes=lambda shape: packed_bytes(*shape, spec.bits),
            quantize=lambda weight, _: QuantizedWeight(quantize_matrix(weight, spec), weight.dtype),
            from_buffers=_from_buffers,
            table="int8",
        )
    )


for _name, _spec in SCHEMES.items():
    _register(_name, _spec)
