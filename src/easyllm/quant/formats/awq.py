"""The AWQ layout for GEMM kernels: `qweight`, `qzeros`, `scales`, 4 bits.

qweight int32 [K, N/8], qzeros int32 [G, N/8]: codes packed along the outputs, 8 to a word, of which
nibble i holds output 0, 2, 4, 6, 1, 3, 5, 7 of the word. scales fp16 [G, N]. Zero points are stored
as they are.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.quant.formats.bits import pack_bits, unpack_bits
from easyllm.quant.formats.config_keys import expect, valid
from easyllm.quant.formats.layout import UniformLayout, check_shapes
from easyllm.quant.quant_tensor import QuantTensor
from easyllm.quant.spec import QuantSpec

NAME = "awq"
TENSORS = ("qweight", "qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output of a word in each of its nibbles, the lowest first."""


def unsupported_reason(spec: QuantSpec, outputs: int, inputs: int) -> str | None:
    """Returns why the layout cannot hold a weight [N, K]; None if it can."""
    if spec.activations:
        return "it has no place for quantized activations (W8A8)"
    if spec.bits != 4:
        return f"it has 4 bits, not {spec.bits}"
    if not isinstance(spec.group_size, int):
        return "it needs a group size"
    if spec.scale_dtype != "float16":
        return f"its scales are float16, not {spec.scale_dtype}"
    if outputs % 8:
        return f"it packs 8 outputs at a time, got {outputs} outputs"
    return spec.unsupported_reason(inputs)


def to_tensors(weight: QuantTensor) -> dict[str, Tensor]:
    """Returns the file's tensors of a weight [N, K]."""
    return {
        "qweight": _pack(weight.codes.T),
        "qzeros": _pack(weight.zeros.T),
        "scales": weight.scales.T.to(torch.float16).contiguous(),
    }


def to_config(spec: QuantSpec) -> JsonObject:
    """Returns the entries of `quantization_config`.

    A symmetric grid is one with zero points of 8, which `zero_point: true` holds as well; readers
    know no other form.
    """
    return {
        "quant_method": NAME,
        "bits": spec.bits,
        "group_size": spec.group_size,
        "zero_point": True,
        "version": "gemm",
    }


def from_tensors(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], config: JsonMapping
) -> QuantTensor:
    """Returns a weight [N, K] of a file; the arguments are those of `gptq.from_tensors`.

    Raises:
        CheckpointError: a tensor has another shape than the configuration says.
    """
    outputs, inputs = shape
    spec = spec_of(config)
    groups = inputs // spec.group(inputs)
    expected = {
        "qweight": (inputs, outputs // 8),
        "qzeros": (groups, outputs // 8),
        "scales": (groups, outputs),
    }
    check_shapes(tensors, expected, spec, inputs)
    return QuantTensor(
        codes=_unpack(tensors["qweight"], outputs).T.contiguous(),
        scales=tensors["scales"].float().T.contiguous(),
        zeros=_unpack(tensors["qzeros"], outputs).T.contiguous(),
        spec=spec,
    )


def spec_of(config: JsonMapping) -> QuantSpec:
    """Returns the grid that a `quantization_config` describes.

    Raises:
        CheckpointError: a value is missing or not supported.
    """
    size = config.get("group_size", 128)
    return valid(
        lambda: QuantSpec(
            bits=config["bits"], group_size=None if size == -1 else size, symmetric=False
        )
    )


def _pack(codes: Tensor) -> Tensor:
    """Packs `codes: [R, N]` to int32 [R, N/8]."""
    ordered = codes.unflatten(1, (-1, 8))[..., list(ORDER)]
    return pack_bits(ordered.flatten(1), 4)


def _unpack(words: Tensor, outputs: int) -> Tensor:
    """Returns the codes [R, N] uint8."""
    nibbles = unpack_bits(words, 4, outputs).unflatten(1, (-1, 8))
    codes = torch.empty_like(nibbles)
    codes[..., list(ORDER)] = nibbles
    return codes.flatten(1)


def _check(config: JsonMapping) -> None:
    gemm = ("gemm",)
    allowed = {"version": gemm, "format": gemm, "checkpoint_format": gemm, "method": (NAME,)}
    allowed |= {"pack_dtype": ("int32",)}
    # gptqmodel's symmetric files say `zero_point: false` and store zero points of 8
    expect(config, NAME, {**allowed, "zero_point": (True, False), "bits": (4,)})


def _describe(
    specs: Mapping[str, QuantSpec],
    skipped: Sequence[str],
    moved: bool,  # noqa: ARG001 - of the interface
) -> JsonObject:
    inner = [name for name in skipped if ".layers." in name]
    return to_config(next(iter(specs.values()))) | {"modules_to_not_convert": inner or None}


_HONOURED = (
    *("bits", "group_size", "zero_point", "version", "modules_to_not_convert"),
    *("format", "checkpoint_format", "method", "pack_dtype"),
)
_NEUTRAL = (
    *("backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config"),
    *("sym", "meta"),
)
"""Keys that are read, and keys of how a reader runs the file. Which linears are quantized follows
from the file's tensors."""

LAYOUT = UniformLayout(
    name=NAME,
    tensors=lambda _: TENSORS,
    unsupported_reason=unsupported_reason,
    to_tensors=to_tensors,
    from_tensors=from_tensors,
    spec_of=spec_of,
    describe=_describe,
    check=_check,
    honoured=_HONOURED,
    neutral=_NEUTRAL,
).register()

__all__ = ["LAYOUT", "NAME", "from_tensors", "spec_of", "to_config", "to_tensors"]
