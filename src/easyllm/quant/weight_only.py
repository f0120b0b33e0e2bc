"""Weight-only quantization: the linears of a loaded model become int8 or int4, its activations stay.

int8 is symmetric with a scale for each output; int4 spans each 32 inputs from minimum to maximum, which finds the grid
again of a checkpoint that was stored so (GGUF's Q4_1). Embedding and head are int8 in both.
"""

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError, suggest
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Embedding, Linear
from easyllm.nn.quantized import QuantizedWeight
from easyllm.ops.quantized_linear import QuantizedMatrix, pack_int4, pack_int8, packed_bytes
from easyllm.quant.spec import QuantSpec

SCHEMES = {
    "int8": QuantSpec(bits=8),
    "int4": QuantSpec(bits=4, group_size=32, symmetric=False),
}
FULL = ("router", "shared_gate")
"""Linears that stay as they are: small, and a token's experts hang on them."""
ROWS = 1024
"""Outputs quantized at once: what is in between stays in the processor's cache. A multiple of the kernel's 8."""


@torch.no_grad()
def quantize_weights(model: Decoder, scheme: str) -> Decoder:
    """Quantizes every linear inside the layers, the embedding and the head, in place.

    A layer's full weights are freed one by one, so that the two never exist at once; `load_model(..., quantize=)` does so while
    it reads, and never holds more than one full weight. Adapters go on working.

    Args:
        scheme: `"int8"` or `"int4"`.

    Raises:
        ConfigError: another scheme; a model that is quantized already, or holds a weight that is not finite.

    Example:
        >>> from easyllm.models import load_model
        >>> quantize_weights(load_model("smollm2"), "int4")  # doctest: +SKIP
    """
    for name, (module, spec) in quantizable(model, scheme).items():
        module.quantize(quantize_weight(module.weight, spec, name))
    return model


def quantizable(model: Decoder, scheme: str) -> dict[str, tuple[Linear | Embedding, QuantSpec]]:
    """What `scheme` rounds, by the names of the weights.

    Raises:
        ConfigError: the scheme is not known, or the model is quantized already.
    """
    if scheme not in SCHEMES:
        raise ConfigError(
            f"quantization {scheme!r} is not known{suggest(scheme, SCHEMES)}; use {' or '.join(SCHEMES)}"
        )
    if model.is_quantized:
        raise ConfigError("the model is quantized already; load it again to quantize it otherwise")
    found: dict[str, tuple[Linear | Embedding, QuantSpec]] = {
        f"{name}.weight": (module, SCHEMES[scheme])
        for name, module in model.layers.named_modules(prefix="layers")
        if isinstance(module, Linear) and not name.endswith(FULL)
    }
    found["embed_tokens.weight"] = (model.embed_tokens, SCHEMES["int8"])
    if model.lm_head is not None:
        found["lm_head.weight"] = (model.lm_head, SCHEMES["int8"])
    return found


def weight_bytes(model: Decoder, dtype: torch.dtype, scheme: str | None = None) -> int:
    """Bytes of a model's weights in `dtype`, or under a scheme and the rest in `dtype`; `model` may be on the meta device."""
    rounded = {} if scheme is None else quantizable(model, scheme)
    return sum(
        packed_bytes(parameter.shape[0], parameter.shape[1], rounded[name][1].bits)
        if name in rounded
        else parameter.numel() * dtype.itemsize
        for name, parameter in model.named_parameters()
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


def quantize_weight(weight: Tensor, spec: QuantSpec, name: str) -> QuantizedWeight:
    """`weight: [N, K]`, called `name`, as what fills a linear's or embedding's slot.

    Raises:
        ConfigError: it holds a number that is not finite.
    """
    if not torch.stack(weight.aminmax()).isfinite().all():
        raise ConfigError(f"{name} holds numbers that are not finite; check the checkpoint")
    return QuantizedWeight(quantize_matrix(weight, spec))
