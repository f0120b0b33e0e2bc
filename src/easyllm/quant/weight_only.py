"""Weight-only quantization: the linears of a loaded model become int8 or int4, its activations stay.

int8 is symmetric with a scale for each output; int4 spans each 32 inputs from minimum to maximum, which finds the grid
again of a checkpoint that was stored so (GGUF's Q4_1). Embedding and head are int8 in both.
"""

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Embedding, Linear
from easyllm.nn.moe import ROUTERS
from easyllm.nn.quantized import QuantizedWeight
from easyllm.nn.storage import WeightStorage
from easyllm.ops.quantized_linear import QuantizedMatrix, pack_int4, pack_int8, packed_bytes
from easyllm.quant.registry import StorageFormat, find_scheme, register_storage
from easyllm.quant.spec import QuantSpec

SCHEMES = {
    "int8": QuantSpec(bits=8),
    "int4": QuantSpec(bits=4, group_size=32, symmetric=False),
}
ROWS = 1024
"""Outputs quantized at once: what is in between stays in the processor's cache. A multiple of the kernel's 8."""


@torch.no_grad()
def quantize_weights(model: Decoder, scheme: str) -> Decoder:
    """Quantizes every linear inside the layers, and embedding and head as the format wants them, in place.

    A layer's full weights are freed one by one, so that the two never exist at once; `load_model(..., quantize=)` does so while
    it reads, and never holds more than one full weight. Adapters continue to work.

    Args:
        scheme: the name of a registered format: `"int8"`, `"int4"` ...

    Raises:
        ConfigError: another scheme; a model that is quantized already, or holds a weight that is NaN or infinite.

    Example:
        >>> from easyllm.models import load_model
        >>> quantize_weights(load_model("smollm2"), "int4")  # doctest: +SKIP
    """
    for name, (layer, format) in quantizable(model, scheme).items():
        layer.store(quantize_weight(layer.storage.dense(), format, name))
    return model


def quantizable(model: Decoder, scheme: str) -> dict[str, tuple[Linear | Embedding, StorageFormat]]:
    """What `scheme` quantizes, by the names of the weights, and to which format.

    Raises:
        ConfigError: the scheme is not known or cannot keep a weight of the model, or the model is quantized already.
    """
    format = find_scheme(scheme)
    if packed := model.packed_formats():
        raise ConfigError(
            f"the model is quantized already ({', '.join(sorted(packed))}); load it again to quantize it as {scheme}"
        )
    found: dict[str, tuple[Linear | Embedding, StorageFormat]] = {
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
            raise ConfigError(f"{name} cannot be kept as {its.name}: {reason}")
    return found


def weight_bytes(model: Decoder, dtype: torch.dtype, scheme: str | None = None) -> int:
    """Bytes of a model's weights in `dtype`, or under a scheme and the rest in `dtype`; `model` may be on the meta device."""
    packed = {} if scheme is None else quantizable(model, scheme)
    held = sum(
        packed[name][1].num_bytes((parameter.shape[0], parameter.shape[1]))
        if name in packed
        else parameter.numel() * dtype.itemsize
        for name, parameter in model.named_parameters()
    )
    return held + sum(
        layer.storage.num_bytes for _, layer in model.holders() if layer.storage.format != "dense"
    )


def quantize_matrix(weight: Tensor, spec: QuantSpec) -> QuantizedMatrix:
    """`weight: [N, K]` rounded to the nearest codes of `spec`.

    |w - ŵ| is at most half a step, s/2, where s = max|w| / 127 of the output (int8) or (max - min) / 15 of the group
    (int4); for int4 add the rounding of s and c to fp16, at most (8 s + |c|) 2^-11.
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
    last = weight[:, -1:].expand(
        -1, missing
    )  # a partial group is filled with what does not widen it
    groups = torch.cat([weight, last], dim=1).view(outputs, -1, 32)
    least, most = groups.aminmax(dim=2)
    # 2^-24 is fp16's smallest number: a group of one value has that step, and the value as its middle
    steps = ((most - least) / 15).to(torch.float16).clamp(min=2**-24)
    middles = (least + 8 * steps.float()).to(torch.float16)
    codes = (groups - middles[..., None].float()) / steps[..., None].float() + 8
    codes = codes.round_().clamp_(0, 15).to(torch.uint8).flatten(1)[:, :inputs]
    return pack_int4(codes, steps, middles)


def quantize_weight(weight: Tensor, format: StorageFormat, name: str) -> WeightStorage:
    """`weight: [N, K]`, called `name`, in another format.

    Raises:
        ConfigError: it holds a number that is NaN or infinite.
    """
    assert format.quantize is not None, "found by find_scheme"
    if not torch.stack(weight.aminmax()).isfinite().all():
        raise ConfigError(f"{name} holds NaN or infinite numbers; check the checkpoint")
    return format.quantize(weight, name)


def _register(name: str, spec: QuantSpec) -> None:
    register_storage(
        StorageFormat(
            name=name,
            num_bytes=lambda shape: packed_bytes(*shape, spec.bits),
            quantize=lambda weight, _: QuantizedWeight(quantize_matrix(weight, spec), weight.dtype),
            table="int8",
        )
    )


for _name, _spec in SCHEMES.items():
    _register(_name, _spec)
