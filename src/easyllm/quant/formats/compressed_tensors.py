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
from easyllm.quant.formats.layout import UniformLayout, check_shapes
from easyllm.quant.quant_tensor import QuantTensor
from easyllm.quant.spec import QuantSpec

NAME = "compressed-tensors"
PACKED, INT = "pack-quantized", "int-quantized"
TENSORS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
BITS = (3, 4, 8)


def unsupported_reason(spec: QuantSpec, outputs: int, inputs: int) -> str | None:  # noqa: ARG001
    """Returns why the packed layout cannot hold a weight [N, K]; None if it can."""
    if spec.bits not in BITS:
        return f"it has {', '.join(map(str, BITS[:-1]))} or {BITS[-1]} bits, not {spec.bits}"
    return spec.unsupported_reason(inputs)


def to_tensors(weight: QuantTensor) -> dict[str, Tensor]:
    """Returns the file's tensors of a weight [N, K]."""
    bits, scale_dtype = weight.spec.bits, weight.spec.torch_scale_dtype
    rows = _scale_rows(weight.spec, len(weight.codes))
    found = {
        "weight_packed": pack_bits(weight.codes, bits),
        "weight_scale": weight.scales[:rows].to(scale_dtype).contiguous(),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if not weight.spec.symmetric:
        found["weight_zero_point"] = pack_bits(weight.zeros[:rows], bits, dim=0)
    return found


def _scale_rows(spec: QuantSpec, outputs: int) -> int:
    """Returns the number of rows of scales in a file."""
    return 1 if spec.group_size == "tensor" else outputs


def int_tensors(weight: QuantTensor) -> dict[str, Tensor]:
    """Returns the file's tensors of a symmetric 8-bit weight [N, K] for W8A8."""
    return {
        "weight": (weight.codes.short() - 128).to(torch.int8),
        "weight_scale": weight.scales.to(weight.spec.torch_scale_dtype).contiguous(),
    }


def to_config(spec: QuantSpec, *, ignore: Sequence[str], activations: bool = False) -> JsonObject:
    """Returns the entries of `quantization_config`.

    Args:
        spec: the grid.
        ignore: names of the linears that stay in full precision.
        activations: whether activations are quantized to 8 bits, too (W8A8).
    """
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
    tokens = weights | {"num_bits": 8, "strategy": "token", "dynamic": True, "group_size": None}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": (tokens | {"symmetric": True}) if activations else None,
        "output_activations": None,
    }
    return {
        "quant_method": NAME,
        "format": INT if activations else PACKED,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def spec_of(config: JsonMapping) -> QuantSpec:
    """Returns the grid that a `quantization_config` describes.

    Raises:
        CheckpointError: it has several groups, or a strategy that is not known.
    """
    groups = list((config.get("config_groups") or {}).values())
    if len(groups) != 1 or not isinstance(groups[0].get("weights"), dict):
        raise CheckpointError(
            f"quantization_config has {len(groups)} config_groups, expected one with weights"
        )
    weights = groups[0]["weights"]
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
    size = {"group": weights.get("group_size"), "channel": None, "tensor": "tensor"}[strategy]
    return valid(
        lambda: QuantSpec(
            bits=weights["num_bits"],
            group_size=size,
            symmetric=weights.get("symmetric", True),
            scale_dtype="float32",
        )
    )


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
    spec = spec_of(config).model_copy(update={"scale_dtype": dtype})
    groups = inputs // spec.group(inputs)
    packed = config.get("format") == PACKED
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
    if kind != PACKED:
        raise CheckpointError(
            f"config.json sets quantization_config.format={kind!r}, which is not supported "
            f"(expected {PACKED!r})"
        )


def _describe(
    spec: QuantSpec,
    skipped: Sequence[str],
    moved: bool,  # noqa: ARG001 - of the interface
) -> JsonObject:
    return to_config(spec, ignore=skipped)


_HONOURED = ("format", "config_groups", "ignore")
_NEUTRAL = ("quantization_status", "global_compression_ratio", "version", "sparsity_config")
"""Keys that are read, and keys of how a file was made. Which linears are quantized follows from the
file's tensors."""

LAYOUT = UniformLayout(
    name=NAME,
    tensors=lambda spec: TENSORS[:-1] if spec.symmetric else TENSORS,
    unsupported_reason=unsupported_reason,
    to_tensors=to_tensors,
    from_tensors=from_tensors,
    spec_of=spec_of,
    describe=_describe,
    check=_check,
    honoured=_HONOURED,
    neutral=_NEUTRAL,
).register()

__all__ = [
    "INT",
    "LAYOUT",
    "NAME",
    "PACKED",
    "from_tensors",
    "int_tensors",
    "spec_of",
    "to_config",
    "to_tensors",
]
