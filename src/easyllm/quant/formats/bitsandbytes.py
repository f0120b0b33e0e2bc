"""The layouts of bitsandbytes in files of transformers: NF4, FP4, and int8 (LLM.int8()).

4 bits   weight uint8 [⌈N·K/2⌉, 1], weight.absmax, weight.quant_map fp32 [16], and
         weight.quant_state.bitsandbytes__nf4 (or fp4), a JSON object as bytes; with double
         quantization absmax is uint8 and there are weight.nested_absmax and
         weight.nested_quant_map fp32 [256], and the offset is in the JSON object
int8     weight int8 [N, K], SCB fp32 [N], weight_format uint8 (0, by row; missing in old files):
         w = weight · SCB / 127
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.nn.blockwise4 import Blockwise4Weight
from easyllm.nn.storage import WeightStorage
from easyllm.ops.blockwise4 import BLOCK, NESTED_BLOCK, Blockwise4, codebook, dynamic_map
from easyllm.quant.formats.config_keys import check_config
from easyllm.quant.llm_int8 import NAME as INT8
from easyllm.quant.llm_int8 import THRESHOLD, Int8Weight
from easyllm.quant.registry import FORMATS, FileLayout, Shape, StorageFormat, register_layout

NAME = "bitsandbytes"
FORMAT, BY_ROW = "weight_format", 0
STATE = "weight.quant_state.bitsandbytes__"


def four_bit_tensors(weight: Blockwise4, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the file's tensors of an NF4 or FP4 weight; files share no memory between tensors.

    Args:
        weight: the weight.
        dtype: dtype that a reader dequantizes to.
    """
    state: JsonObject = {
        "quant_type": weight.codebook,
        "blocksize": BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [weight.outputs, weight.inputs],
    }
    found = {
        "weight": weight.codes[:, None],
        "weight.absmax": weight.absmax,
        "weight.quant_map": codebook(weight.codebook, weight.codes.device).clone(),
    }
    if weight.nested_absmax is not None and weight.nested_offset is not None:
        offset = float(weight.nested_offset)
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        state |= {"nested_offset": offset}
        found["weight.nested_absmax"] = weight.nested_absmax
        found["weight.nested_quant_map"] = dynamic_map(weight.codes.device).clone()
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return found | {f"{STATE}{weight.codebook}": torch.from_numpy(text.copy())}


def _four_bit_weight(
    kind: str, nested: bool, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype
) -> Blockwise4Weight:
    """Returns the weight of a file's tensors.

    Raises:
        CheckpointError: a tensor does not have the shape, dtype or values of the layout.
    """
    outputs, inputs = shape
    state = json.loads(bytes(tensors[f"{STATE}{kind}"].cpu().numpy().tobytes()))
    expected = {"quant_type": kind, "blocksize": BLOCK, "shape": [outputs, inputs]}
    if nested:
        expected |= {"nested_blocksize": NESTED_BLOCK}
    for key, value in expected.items():
        if state.get(key) != value:
            raise CheckpointError(
                f"its quant_state has {key}={state.get(key)!r}, expected {value!r}"
            )
    blocks = -(-outputs * inputs // BLOCK)
    shapes = {"weight": (-(-outputs * inputs // 2), 1), "weight.absmax": (blocks,)}
    maps = {"weight.quant_map": codebook(kind, torch.device("cpu"))}
    if nested:
        shapes["weight.nested_absmax"] = (-(-blocks // NESTED_BLOCK),)
        maps["weight.nested_quant_map"] = dynamic_map(torch.device("cpu"))
    for name, size in shapes.items():
        if tuple(tensors[name].shape) != size:
            raise CheckpointError(
                f"{name} has shape {list(tensors[name].shape)}, expected {list(size)}"
            )
    integers = ("weight", "weight.absmax") if nested else ("weight",)
    for name in shapes:
        its, wanted = tensors[name].dtype, torch.uint8 if name in integers else torch.float32
        if its != wanted:
            raise CheckpointError(f"{name} has dtype {its}, expected {wanted}")
    for name, values in maps.items():
        found = tensors[name].float().cpu()
        if found.shape != values.shape or not torch.allclose(found, values, rtol=0, atol=1e-6):
            raise CheckpointError(f"{name} has other values than those of {kind}")
    offset = torch.tensor(float(state["nested_offset"])) if nested else None
    return Blockwise4Weight(
        Blockwise4(
            tensors["weight"].flatten(),
            tensors["weight.absmax"],
            tensors["weight.nested_absmax"] if nested else None,
            offset,
            kind,
            outputs,
            inputs,
        ),
        dtype,
        kind if nested else f"{kind}-single",
    )


def _four_bit_format(kind: str, *, nested: bool) -> StorageFormat:
    more = ("weight.nested_absmax", "weight.nested_quant_map") if nested else ()
    return replace(
        FORMATS[kind if nested else f"{kind}-single"],
        file_tensors=("weight", "weight.absmax", "weight.quant_map", *more, f"{STATE}{kind}"),
        from_file=partial(_four_bit_weight, kind, nested),
    )


def _int8_weight(
    threshold: float, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype
) -> Int8Weight:
    codes, scb = tensors["weight"], tensors["SCB"]
    order = int(tensors[FORMAT]) if FORMAT in tensors else BY_ROW
    if order != BY_ROW:
        raise CheckpointError(f"{FORMAT} is {order}, expected {BY_ROW}: codes by row")
    if not scb.is_floating_point():
        raise CheckpointError(f"SCB has dtype {scb.dtype}, expected torch.float32")
    if codes.dtype != torch.int8 or tuple(codes.shape) != shape or scb.numel() != shape[0]:
        raise CheckpointError(
            f"weight is {codes.dtype} {list(codes.shape)} with {scb.numel()} scales, expected "
            f"torch.int8 {list(shape)} with {shape[0]}"
        )
    return Int8Weight.pack(codes, scb.float().flatten(), threshold, dtype)


def _int8_format(threshold: float) -> StorageFormat:
    read = partial(_int8_weight, threshold)
    return replace(
        FORMATS[INT8],
        file_tensors=("weight", "SCB"),
        optional_tensors=(FORMAT,),
        from_file=read,
    )


def _format_of(config: JsonMapping) -> StorageFormat:
    """Returns the format of a checkpoint with this `quantization_config`.

    Raises:
        CheckpointError: it is neither 4 nor 8 bits, or has values that are not supported.
    """
    check_config(config, honoured=_HONOURED, neutral=_NEUTRAL)
    four, eight = config.get("load_in_4bit", False), config.get("load_in_8bit", False)
    if four == eight:
        raise CheckpointError(
            f"quantization_config has load_in_4bit={four!r} and load_in_8bit={eight!r}, expected "
            "one of them"
        )
    if eight:
        return _int8_format(float(config.get("llm_int8_threshold", THRESHOLD)))
    kind, stored = config.get("bnb_4bit_quant_type"), config.get("bnb_4bit_quant_storage", "uint8")
    if kind not in ("nf4", "fp4") or stored != "uint8":
        raise CheckpointError(
            f"quantization_config has bnb_4bit_quant_type={kind!r} and bnb_4bit_quant_storage="
            f"{stored!r}, expected nf4 or fp4 in uint8"
        )
    return _four_bit_format(str(kind), nested=bool(config.get("bnb_4bit_use_double_quant")))


def _config_of(packed: Mapping[str, WeightStorage], skipped: Sequence[str]) -> JsonObject:
    storages = list(packed.values())
    first = storages[0]
    config: JsonObject = {
        "quant_method": NAME,
        "load_in_4bit": isinstance(first, Blockwise4Weight),
        "load_in_8bit": isinstance(first, Int8Weight),
        "llm_int8_threshold": first.threshold if isinstance(first, Int8Weight) else THRESHOLD,
        "llm_int8_skip_modules": list(skipped) or None,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
    }
    if isinstance(first, Blockwise4Weight):
        config["bnb_4bit_quant_type"] = first.codebook
        config["bnb_4bit_use_double_quant"] = first.nested_absmax is not None
    return config


def _tensors_of(storage: WeightStorage) -> Mapping[str, Tensor]:
    """Returns the file's tensors of a weight of this layout."""
    if isinstance(storage, Blockwise4Weight):
        return four_bit_tensors(storage.matrix, storage.dtype)
    return {**storage.tensors(), FORMAT: torch.tensor(BY_ROW, dtype=torch.uint8)}


_HONOURED = (
    *("load_in_4bit", "load_in_8bit", "llm_int8_threshold", "llm_int8_skip_modules"),
    *("bnb_4bit_quant_type", "bnb_4bit_quant_storage", "bnb_4bit_use_double_quant"),
)
_NEUTRAL = (
    *("_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype", "llm_int8_has_fp16_weight"),
    *("llm_int8_enable_fp32_cpu_offload", "target_parameters"),
)
"""Keys that are read, and keys of how a model is run. Which linears are quantized follows from the
file's tensors."""

register_layout(
    FileLayout(name=NAME, format_of=_format_of, config_of=_config_of, tensors_of=_tensors_of)
)

__all__ = ["NAME", "four_bit_tensors"]
