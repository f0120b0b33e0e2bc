"""The layouts of compressed-tensors: `pack-quantized` (weights alone) and `int-quantized` (W8A8).

pack-quantized   weight_packed int32 [N, ⌈K·b/32⌉] (codes packed along the inputs), weight_scale
                 [N, G], weight_shape int64 [2], and where the grid is asymmetric
                 weight_zero_point int32 [⌈N·b/32⌉, G] (packed along the outputs)
int-quantized    weight int8 [N, K] (code − 128), weight_scale [N, 1]; activations are quantized to
                 8 bits token by token while it runs
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.quant.formats.bits import pack_bits, packed_words, unpack_bits
from easyllm.quant.formats.config_keys import valid
from easyllm.quant.formats.layout import UniformLayout, check_shapes, grids
from easyllm.quant.quant_tensor import QuantTensor
from easyllm.quant.spec import QuantSpec

NAME = "compressed-tensors"
PACKED, INT = "pack-quantized", "int-quantized"
TENSORS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
INT_TENSORS = ("weight", "weight_scale")
BITS = (3, 4, 8)


def unsupported_reason(spec: QuantSpec, outputs: int, inputs: int) -> str | None:  # noqa: ARG001
    """Returns why the layout cannot hold a weight [N, K]; None if it can."""
    if spec.activations and not (spec.bits == 8 and spec.symmetric):
        return "quantized activations (W8A8) need symmetric weights of 8 bits"
    if spec.activations and isinstance(spec.group_size, int):
        return "quantized activations (W8A8) need one scale per output row, not groups"
    if spec.bits not in BITS:
        return f"it has {', '.join(map(str, BITS[:-1]))} or {BITS[-1]} bits, not {spec.bits}"
    return spec.unsupported_reason(inputs)


def to_tensors(weight: QuantTensor) -> dict[str, Tensor]:
    """Returns the file's tensors of a weight [N, K]."""
    bits, scale_dtype = weight.spec.bits, weight.spec.torch_scale_dtype
    rows = _scale_rows(weight.spec, len(weight.codes))
    scales = weight.scales[:rows].to(scale_dtype).contiguous()
    if weight.spec.activations:
        codes = (weight.codes.short() - 128).to(torch.int8)
        return {"weight": codes, "weight_scale": scales}
    found = {
        "weight_packed": pack_bits(weight.codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if not weight.spec.symmetric:
        found["weight_zero_point"] = pack_bits(weight.zeros[:rows], bits, dim=0)
    return found


def _scale_rows(spec: QuantSpec, outputs: int) -> int:
    """Returns the number of rows of scales in a file."""
    return 1 if spec.group_size == "tensor" else outputs


def to_config(specs: Mapping[str, QuantSpec], *, ignore: Sequence[str]) -> JsonObject:
    """Returns the entries of `quantization_config`.

    Args:
        specs: the grid of each linear, by its file name.
        ignore: names of the linears that stay in full precision.
    """
    found = grids(specs)
    groups = {
        f"group_{i}": _group(spec, ["Linear"] if len(found) == 1 else names)
        for i, (spec, names) in enumerate(found.items())
    }
    return {
        "quant_method": NAME,
        "format": INT if next(iter(found)).activations else PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(spec: QuantSpec, targets: Sequence[str]) -> JsonObject:
    strategy = "group"
    if not isinstance(spec.group_size, int):
        strategy = "channel" if spec.group_size is None else "tensor"
    weights: JsonObject = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": strategy,
        "group_size": spec.group_size if strategy == "group" else None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    tokens = weights | {"strategy": "token", "dynamic": True, "observer": None}
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": tokens if spec.activations else None,
        "output_activations": None,
    }


def spec_of(config: JsonMapping) -> QuantSpec:
    """Returns the grid that a `quantization_config` describes first."""
    return _specs_of(config)[0]


def _specs_of(config: JsonMapping) -> list[QuantSpec]:
    """Returns the grid of each group of linears.

    Raises:
        CheckpointError: there are none, or one is not supported.
    """
    groups = list((config.get("config_groups") or {}).values())
    if not groups or not all(isinstance(group.get("weights"), dict) for group in groups):
        raise CheckpointError(
            f"quantization_config has {len(groups)} config_groups, expected one or more with "
            "weights"
        )
    return [_spec_of_group(config, group) for group in groups]


def _spec_of_group(config: JsonMapping, group: JsonMapping) -> QuantSpec:
    weights = group["weights"]
    if weights.get("type") != "int" or weights.get("num_bits") not in BITS:
        raise CheckpointError(
            f"weights of type {weights.get('type')!r} with {weights.get('num_bits')} bits are not "
            f"supported (expected int with {' or '.join(map(str, BITS))} bits)"
        )
    strategy = weights.get("strategy")
    if strategy not in ("group", "channel", "tensor"):
        raise CheckpointError(f"the strategy {strategy!r} of weights is not supported")
    if weights.get("actorder") not in (None, "static", "weight"):
        raise CheckpointError(f"actorder={weights['actorder']!r} is not supported")
    activations = _activations(config, group)
    size = {"group": weights.get("group_size"), "channel": None, "tensor": "tensor"}[strategy]
    return valid(
        lambda: QuantSpec(
            bits=weights["num_bits"],
            group_size=size,
            symmetric=weights.get("symmetric", True),
            scale_dtype="float32",
            activations=activations,
        )
    )


def _activations(config: JsonMapping, group: JsonMapping) -> bool:
    """Returns whether activations are quantized to 8 bits, token by token.

    Raises:
        CheckpointError: they are quantized in another way.
    """
    found = group.get("input_activations")
    if group.get("output_activations") is not None:
        raise CheckpointError("quantized outputs (output_activations) are not supported")
    if config.get("format") == PACKED and found is None:
        return False
    expected = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}
    expected["strategy"] = "token"
    if config.get("format") != INT or any((found or {}).get(k) != v for k, v in expected.items()):
        raise CheckpointError(
            f"quantization_config has the format {config.get('format')!r} with input_activations="
            f"{found!r:.200}, which is not supported (expected {PACKED!r} with none, or {INT!r} "
            "with 8 bits, symmetric, dynamic, token by token)"
        )
    return True


def _spec_that_fits(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], config: JsonMapping
) -> QuantSpec:
    """Returns the grid whose shapes a weight's tensors have; the first one if none fits."""
    specs = _specs_of(config)
    if "weight_packed" not in tensors:
        return specs[0]
    words, scales = tensors["weight_packed"].shape[-1], tensors["weight_scale"].numel()
    for spec in specs:
        number = _scale_rows(spec, shape[0]) * (shape[1] // spec.group(shape[1]))
        if (packed_words(shape[1], spec.bits), number) == (words, scales):
            return spec
    return specs[0]


def from_tensors(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], config: JsonMapping
) -> QuantTensor:
    """Returns a weight [N, K] of a file; the arguments are those of `gptq.from_tensors`.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the configuration says.
    """
    outputs, inputs = shape
    scale = tensors["weight_scale"]
    dtype = str(scale.dtype).removeprefix("torch.")
    spec = _spec_that_fits(tensors, shape, config).model_copy(update={"scale_dtype": dtype})
    groups = inputs // spec.group(inputs)
    packed = not spec.activations
    rows = _scale_rows(spec, outputs)
    expected: dict[str, tuple[int, ...]] = {"weight": (outputs, inputs)}
    if packed:
        expected = {"weight_packed": (outputs, packed_words(inputs, spec.bits))}
        if not spec.symmetric:
            expected["weight_zero_point"] = (packed_words(rows, spec.bits), groups)
    if scale.numel() != rows * groups:  # one scale may be a vector
        expected["weight_scale"] = (rows, groups)
    check_shapes(tensors, expected, spec, inputs)
    stored = tensors.get("weight_shape")
    if stored is not None and stored.tolist() != [outputs, inputs]:
        raise CheckpointError(f"weight_shape is {stored.tolist()}, expected {[outputs, inputs]}")
    if packed:
        codes = unpack_bits(tensors["weight_packed"], spec.bits, inputs)
    else:
        codes = (tensors["weight"].short() + 128).to(torch.uint8)
    scales = scale.float().view(rows, groups).expand(outputs, groups).contiguous()
    zeros = torch.full_like(scales, spec.middle, dtype=torch.uint8)
    if packed and not spec.symmetric:
        zeros = unpack_bits(tensors["weight_zero_point"], spec.bits, rows, dim=0)
        zeros = zeros.expand(outputs, groups).contiguous()
    return QuantTensor(codes=codes, scales=scales, zeros=zeros, spec=spec)


def _check(config: JsonMapping) -> None:
    kind = config.get("format")
    if kind not in (PACKED, INT):
        raise CheckpointError(
            f"config.json sets quantization_config.format={kind!r}, which is not supported "
            f"(expected {PACKED!r} or {INT!r})"
        )


def _describe(
    specs: Mapping[str, QuantSpec],
    skipped: Sequence[str],
    moved: bool,  # noqa: ARG001 - of the interface
) -> JsonObject:
    return to_config(specs, ignore=skipped)


def _tensors(spec: QuantSpec) -> tuple[str, ...]:
    if spec.activations:
        return INT_TENSORS
    return TENSORS[:-1] if spec.symmetric else TENSORS


_HONOURED = ("format", "config_groups", "ignore")
_NEUTRAL = ("quantization_status", "global_compression_ratio", "version", "sparsity_config")
"""Keys that are read, and keys of how a file was made. Which linears are quantized follows from the
file's tensors."""

LAYOUT = UniformLayout(
    name=NAME,
    tensors=_tensors,
    unsupported_reason=unsupported_reason,
    to_tensors=to_tensors,
    from_tensors=from_tensors,
    spec_of=spec_of,
    describe=_describe,
    check=_check,
    holds_several=True,
    honoured=_HONOURED,
    neutral=_NEUTRAL,
).register()

__all__ = [
    "INT",
    "LAYOUT",
    "NAME",
    "PACKED",
    "from_tensors",
    "spec_of",
    "to_config",
    "to_tensors",
]
