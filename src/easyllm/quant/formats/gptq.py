"""The GPTQ layout: `qweight`, `qzeros`, `scales`, `g_idx`.

qweight int32 [K·b/32, N]: codes packed along the inputs. qzeros int32 [G, N·b/32]: zero points
packed along the outputs. scales fp16 [G, N]. g_idx int32 [K]: the group of each input.

`checkpoint_format: gptq` stores zero points less one, `gptq_v2` as they are. Less one, a zero point
of 0 wraps around to the largest code and readers disagree on it, so asymmetric weights are written
as v2; symmetric ones, whose zero point is 2^(b − 1), as the older format, which every reader takes.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.quant.formats.bits import pack_bits, packed_words, unpack_bits
from easyllm.quant.formats.config_keys import check_config, expect, valid
from easyllm.quant.formats.layout import UniformLayout, check_shapes, grids
from easyllm.quant.quant_tensor import QuantTensor
from easyllm.quant.spec import QuantSpec

NAME = "gptq"
TENSORS = ("qweight", "qzeros", "scales", "g_idx")
PER_LINEAR = ("bits", "group_size", "sym")
"""Keys that `dynamic` can change for some linears."""
V1, V2 = "gptq", "gptq_v2"


def unsupported_reason(spec: QuantSpec, outputs: int, inputs: int) -> str | None:
    """Returns why the layout cannot hold a weight [N, K]; None if it can."""
    if spec.activations:
        return "it has no place for quantized activations (W8A8)"
    if spec.group_size == "tensor":
        return "it has one scale per row or group, not one per tensor"
    if spec.scale_dtype != "float16":
        return f"its scales are float16, not {spec.scale_dtype}"
    unit = 32 if spec.bits == 3 else 32 // spec.bits
    for what, size in (("inputs", inputs), ("outputs", outputs)):
        if size % unit:
            return f"it packs {unit} codes of {spec.bits} bits at a time, got {size} {what}"
    return spec.unsupported_reason(inputs)


def to_tensors(weight: QuantTensor) -> dict[str, Tensor]:
    """Returns the file's tensors of a weight [N, K]."""
    zeros = weight.zeros.long() - (1 if weight.spec.symmetric else 0)
    return {
        "qweight": pack_bits(weight.codes.T, weight.spec.bits, dim=0),
        "qzeros": pack_bits(zeros.T.contiguous(), weight.spec.bits),
        "scales": weight.scales.T.to(torch.float16).contiguous(),
        "g_idx": weight.groups().to(torch.int32),
    }


def to_config(spec: QuantSpec, *, act_order: bool) -> JsonObject:
    """Returns the entries of `quantization_config`."""
    return {
        "quant_method": NAME,
        "bits": spec.bits,
        "group_size": spec.group_size if isinstance(spec.group_size, int) else -1,
        "sym": spec.symmetric,
        "desc_act": act_order,
        "checkpoint_format": V1 if spec.symmetric else V2,
        "pack_dtype": "int32",
    }


def from_tensors(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], config: JsonMapping
) -> QuantTensor:
    """Returns a weight [N, K] of a file.

    Args:
        tensors: `TENSORS`; `g_idx` may be missing.
        shape: (N, K).
        config: `quantization_config`.

    Raises:
        CheckpointError: a tensor has another shape than the configuration says, or an index is out
            of range.
    """
    outputs, inputs = shape
    spec = _spec_that_fits(tensors, inputs, config)
    groups = inputs // spec.group(inputs)
    expected = {
        "qweight": (packed_words(inputs, spec.bits), outputs),
        "qzeros": (groups, packed_words(outputs, spec.bits)),
        "scales": (groups, outputs),
        "g_idx": (inputs,),
    }
    check_shapes(tensors, expected, spec, inputs)
    added = 0 if _version(config) == V2 else 1
    zeros = unpack_bits(tensors["qzeros"], spec.bits, outputs).T + added
    zeros = zeros.to(torch.uint8).contiguous()
    symmetric = bool((zeros == spec.middle).all())  # whatever the configuration says
    order = tensors.get("g_idx")
    in_order = torch.arange(inputs, device=tensors["qweight"].device) // spec.group(inputs)
    moved = order is not None and not torch.equal(order.long(), in_order)
    if moved and not 0 <= int(order.min()) <= int(order.max()) < groups:  # type: ignore[union-attr]
        raise CheckpointError(f"g_idx names groups outside 0 .. {groups - 1}")
    return QuantTensor(
        codes=unpack_bits(tensors["qweight"], spec.bits, inputs, dim=0).T.contiguous(),
        scales=tensors["scales"].float().T.contiguous(),
        zeros=zeros,
        spec=spec.model_copy(update={"symmetric": symmetric}),
        group_of=order.long() if moved else None,  # type: ignore[union-attr]
    )


def _spec_that_fits(tensors: Mapping[str, Tensor], inputs: int, config: JsonMapping) -> QuantSpec:
    """Returns the grid whose shapes a weight's tensors have; the common one if none fits."""
    specs = _specs_of(config)
    rows, groups = tensors["qweight"].shape[0], tensors["scales"].shape[0]
    for spec in specs:
        fits = (packed_words(inputs, spec.bits), inputs // spec.group(inputs))
        if fits == (rows, groups):
            return spec
    return specs[0]


def _specs_of(config: JsonMapping) -> list[QuantSpec]:
    """Returns the grids of all linears: the common one, and those that `dynamic` gives some."""
    found = [spec_of(config)]
    for pattern, changed in (config.get("dynamic") or {}).items():
        if not str(pattern).startswith("-:"):
            check_config(changed, honoured=PER_LINEAR, neutral=_NEUTRAL)
            found.append(spec_of({**config, **changed}))
    return found


def spec_of(config: JsonMapping) -> QuantSpec:
    """Returns the grid that a `quantization_config` describes.

    Raises:
        CheckpointError: a value is missing or not supported.
    """
    size = config.get("group_size", -1)
    return valid(
        lambda: QuantSpec(
            bits=config["bits"],
            group_size=None if size == -1 else size,
            symmetric=config.get("sym", True),
        )
    )


def _version(config: JsonMapping) -> str:
    """Returns how zero points are stored; gptqmodel writes `format` as well, its older name."""
    return str(config.get("checkpoint_format") or config.get("format") or V1)


def _check(config: JsonMapping) -> None:
    expect(config, NAME, {"checkpoint_format": (V1, V2), "format": (V1, V2), "method": (NAME,)})
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(v, dict) for v in dynamic.values()):
        raise CheckpointError(
            f"config.json sets quantization_config.dynamic={dynamic!r:.100}, expected an object "
            "of objects"
        )
    if config.get("format") not in (None, _version(config)):
        raise CheckpointError(
            f"config.json sets quantization_config.format={config['format']!r} and "
            f"checkpoint_format={_version(config)!r}, which must be equal"
        )


def _describe(specs: Mapping[str, QuantSpec], skipped: Sequence[str], moved: bool) -> JsonObject:
    (spec, _), *others = grids(specs).items()
    inner: JsonObject = {f"-:{re.escape(name)}$": {} for name in skipped if ".layers." in name}
    for other, names in others:
        changed = {key: to_config(other, act_order=moved)[key] for key in PER_LINEAR}
        inner |= {f"+:{re.escape(name)}$": changed for name in names}
    return to_config(spec, act_order=moved) | ({"dynamic": inner} if inner else {})


_HONOURED = ("bits", "group_size", "sym", "checkpoint_format", "format", "method", "dynamic")
_NEUTRAL = (
    *("desc_act", "static_groups", "true_sequential", "damp_percent", "damp_auto_increment"),
    *("pack_dtype", "lm_head", "meta", "quantizer", "model_name_or_path", "model_file_base_name"),
    *(
        "is_marlin_format",
        "dataset",
        "tokenizer",
        "use_cuda_fp16",
        "batch_size",
        "module_name_preceding_first_block",
    ),
)
"""Keys that are read, and keys of how a file was made. `dynamic` only names linears here; which of
them are quantized follows from the file's tensors."""

LAYOUT = UniformLayout(
    name=NAME,
    tensors=lambda _: TENSORS,
    unsupported_reason=unsupported_reason,
    to_tensors=to_tensors,
    from_tensors=from_tensors,
    spec_of=spec_of,
    describe=_describe,
    check=_check,
    holds_order=True,
    holds_several=True,
    honoured=_HONOURED,
    neutral=_NEUTRAL,
).register()

__all__ = ["LAYOUT", "NAME", "from_tensors", "spec_of", "to_config", "to_tensors"]
