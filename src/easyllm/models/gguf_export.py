"""Writes a model as a GGUF file, in full precision or in one of GGUF's block types.

The tensors of linears get the type asked for, in 16 bits where no block of it divides their width
as llama.cpp's own tool does (K-quants fall back to the 32-weight type of about their size first).
Norms and routers stay in fp32. Embedding and head are larger than other tensors of the same effect
and get at least 6 bits.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from easyllm.adapters.targets import name_matches
from easyllm.checkpoint.keymap import Binding
from easyllm.core.atomic import atomic_file
from easyllm.core.errors import CheckpointError, ConfigError, suggest
from easyllm.core.json_types import Json, JsonObject
from easyllm.core.progress import Progress
from easyllm.models.families import family_named
from easyllm.models.families.gguf_layout import ROPE_FACTORS, Divided
from easyllm.models.families.gguf_write import rope_factors
from easyllm.models.hf_config import write_config
from easyllm.models.hf_names import keymap_of
from easyllm.nn.decoder import Decoder
from easyllm.quant.gguf_blocks import TYPES, quantize_blocks
from easyllm.tokenizer.to_gguf import tokenizer_metadata
from easyllm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import gguf

FULL = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SMALLER = {"q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0"}
"""What llama.cpp's tool writes instead of a K-quant where 256 does not divide the width."""
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""A number between the dots of a name, of a layer or an expert."""
AT_LEAST_SIX = ("token_embd.weight", "output.weight")
IN_FP32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q4_k": 14,
    "q5_k": 16,
    "q6_k": 18,
    "bf16": 32,
}
"""`general.file_type` of each type."""


def gguf_types() -> list[str]:
    """Returns the names of the types that a file can be written in."""
    return [*FULL, *TYPES]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        types: the type of each tensor, by its name in the file.
        fallbacks: for each tensor in another type than asked for because of its width, its name and
            the type.
    """

    path: Path
    types: Mapping[str, str]
    fallbacks: Mapping[str, str]


def save_gguf(
    model: Decoder,
    path: Path,
    *,
    type: str,
    tokenizer: Tokenizer,
    importance: Mapping[str, Tensor] | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    name: str = "model",
    replace: bool = False,
) -> Exported:
    """Writes a model as a GGUF file that llama.cpp runs.

    Args:
        model: the model, dense, without an adapter.
        path: the file.
        type: `f32`, `f16`, `bf16`, `q8_0`, `q4_k` ... (`gguf_types()`).
        tokenizer: its tokenizer, byte-level BPE or SentencePiece BPE.
        importance: mean squares [K] of the inputs of linears, by our names
            (`layers.0.mixer.q_proj`).
        overrides: (pattern of our names, type) for some matrices; the last that matches counts.
        name: `general.name`.
        replace: whether an existing file may be replaced.

    Raises:
        ConfigError: the type is unknown.
        CheckpointError: GGUF cannot represent the model or its tokenizer, or the model has an
            adapter or quantized weights.
        OutputError: the file exists, or cannot be written.
    """
    check_gguf(model, type=type, tokenizer=tokenizer, overrides=overrides)
    plan = _Plan(model, type, importance or {}, overrides)
    metadata = plan.metadata(name) | tokenizer_metadata(tokenizer, model.config.vocab_size)
    tensors = list(plan.tensors())
    import gguf

    with atomic_file(path, replace=replace) as work:
        writer = gguf.GGUFWriter(work, plan.layout.architectures[0])
        for key, value in metadata.items():
            _add(writer, key, value)
        for tensor in tensors:
            writer.add_tensor_info(
                tensor.name,
                tensor.stored_shape,
                np.dtype(np.uint8),
                tensor.num_bytes,
                raw_dtype=getattr(gguf.GGMLQuantizationType, tensor.type.upper()),
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with Progress("writing", total=len(tensors), unit="tensor") as progress:
            for tensor in tensors:
                writer.write_tensor_data(tensor.data().numpy())
                progress.advance(1)
        writer.close()
    return Exported(
        path,
        {tensor.name: tensor.type for tensor in tensors},
        {tensor.name: tensor.type for tensor in tensors if tensor.fell_back},
    )


def check_gguf(
    model: Decoder,
    *,
    type: str,
    tokenizer: Tokenizer,
    overrides: Sequence[tuple[str, str]] = (),
    to_be_merged: bool = False,
) -> None:
    """Checks that a model can be written as a GGUF file.

    Args:
        model, type, tokenizer, overrides: as for `save_gguf`.
        to_be_merged: whether an adapter is merged before the file is written.

    Raises:
        ConfigError, CheckpointError: as for `save_gguf`.
    """
    if type not in gguf_types():
        raise ConfigError(
            f"GGUF type {type!r} is not known{suggest(type, gguf_types())}; use "
            f"{', '.join(gguf_types())}"
        )
    adapted = model.is_adapted and not to_be_merged
    if adapted or model.packed_formats():
        what = "an adapter" if adapted else "quantized weights"
        raise CheckpointError(
            f"the model has {what}, which a GGUF file is not written from; "
            f"{'merge it first' if adapted else 'load the full-precision model'}"
        )
    plan = _Plan(model, type, {}, overrides)
    tokenizer_metadata(tokenizer, model.config.vocab_size)
    list(plan.tensors())


@dataclass(frozen=True, slots=True, kw_only=True)
class _FileTensor:
    """A tensor to write.

    Attributes:
        name: its name in the file.
        shape: its shape, the slowest dimension first.
        type: its type.
        fell_back: whether another type was asked for.
        parts: computes its matrices (several if experts are stacked) in fp32, with the mean squares
            of their inputs.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    fell_back: bool
    parts: Callable[[], Iterator[tuple[Tensor, Tensor | None]]]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        width = self.shape[-1]
        if self.type in FULL:
            return width * FULL[self.type].itemsize
        return width // TYPES[self.type].block * TYPES[self.type].num_bytes

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape as bytes."""
        return (*self.shape[:-1], self.row_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""
        return math.prod(self.stored_shape)

    def data(self) -> Tensor:
        """Returns the bytes, uint8 in `stored_shape`."""
        found = []
        for tensor, importance in self.parts():
            if self.type in FULL:
                stored = tensor.to(FULL[self.type]).contiguous()
                found.append(stored.flatten().view(torch.uint8))
            else:
                rows = tensor.flatten(0, -2)
                found.append(quantize_blocks(rows, TYPES[self.type], importance).flatten())
        return torch.cat(found).view(self.stored_shape)


class _Plan:
    """What the file of a model contains.

    Args:
        model: the model.
        type: the type of its linears.
        importance: mean squares of the inputs of linears, by our names.
        overrides: types of some matrices, by patterns of our names.

    Raises:
        CheckpointError: its family is not written as GGUF, or a tensor has no name there.
    """

    def __init__(
        self,
        model: Decoder,
        type: str,
        importance: Mapping[str, Tensor],
        overrides: Sequence[tuple[str, str]],
    ) -> None:
        family = family_named(model.config.family)
        layout = family_named(family.gguf_family).gguf if family.gguf_family else family.gguf
        if layout is None or family.write_gguf is None:
            raise CheckpointError(
                f"models of the family {family.name!r} cannot be written as GGUF; save the model "
                "as a Hugging Face folder"
            )
        self.layout, self._type, self._importance = layout, type, importance
        self._overrides = overrides
        self._hf = write_config(model.config)
        self._keys = family.write_gguf(self._hf)
        self._state = {
            name: parameter.detach()
            for name, parameter in chain(model.named_parameters(), model.named_buffers())
            if "adapter" not in name.split(".")  # merged before the file is written
        }
        self._keymap = keymap_of(model.config, gguf=True)
        self._names = {theirs: ours for ours, theirs in layout.names.items()}

    def metadata(self, name: str) -> JsonObject:
        """Returns the metadata without the tokenizer's."""
        architecture = self.layout.architectures[0]
        return {
            "general.type": "model",
            "general.name": name,
            "general.file_type": FILE_TYPES[self._type],
            "general.quantization_version": 2,
            **{f"{architecture}.{key}": value for key, value in self._keys.items()},
        }

    def tensors(self) -> Iterator[_FileTensor]:
        """Yields the tensors."""
        stacks = dict[str, list[Binding]]()
        for binding in self._keymap.bindings(self._state):
            for theirs in self._stored_names(binding.theirs):
                stacks.setdefault(self._name(theirs), []).append(binding)
        for name, bindings in stacks.items():
            # transforms also work on the meta device, so that no value is computed for a shape
            shape = tuple(self._converted(bindings[0], name, device="meta").shape)
            each = {self._wanted(name, b.ours[0].removesuffix(".weight")) for b in bindings}
            if len(each) > 1:
                raise ConfigError(
                    f"the experts of a layer are one tensor in GGUF ({name}), but the overrides "
                    f"give them the types {' and '.join(sorted(each))}; use a pattern for all"
                )
            wanted = each.pop()
            kind = self._type_of(name, shape, wanted)
            yield _FileTensor(
                name=name,
                shape=(len(bindings), *shape) if "_exps." in name else shape,
                type=kind,
                fell_back=len(shape) > 1 and kind not in (wanted, "f32"),
                parts=partial(self._parts, name, bindings),
            )
        factors = rope_factors(self._hf)
        if factors is not None:
            yield _FileTensor(
                name=ROPE_FACTORS,
                shape=tuple(factors.shape),
                type="f32",
                fell_back=False,
                parts=lambda: iter([(factors, None)]),
            )

    def _parts(
        self, name: str, bindings: Sequence[Binding]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        for binding in bindings:
            ours = binding.ours[0].removesuffix(".weight")
            yield self._converted(binding, name), self._importance.get(ours)

    def _converted(self, binding: Binding, name: str, device: str = "cpu") -> Tensor:
        """Returns a tensor in the file's row order, fp32."""
        parts = [self._state[ours].to(device, torch.float32) for ours in binding.ours]
        joined = binding.rule.join(parts)
        template = _template(name.rpartition(".")[0])
        divided = self._divided(binding.theirs)
        if divided is not None:
            number = list(divided.parts).index(self.layout.names[template])
            joined = divided.rule(self._hf).split(joined)[number]
        convert = self.layout.untransforms.get(template)
        return joined if convert is None else convert(joined, self._hf)

    def _divided(self, theirs: str) -> Divided | None:
        """Returns how the file divides a tensor with this Hugging Face name, or None."""
        return self.layout.divided.get(_template(theirs.rpartition(".")[0]))

    def _stored_names(self, theirs: str) -> list[str]:
        """Returns the HF-like names of the tensors that hold a tensor of a Hugging Face file."""
        divided = self._divided(theirs)
        if divided is None:
            return [theirs]
        number = NUMBER.findall(theirs)[0]
        return [f"{part.replace('{i}', number)}.weight" for part in divided.parts]

    def _name(self, theirs: str) -> str:
        """Returns the name in the file of a tensor with this Hugging Face name.

        Raises:
            CheckpointError: the file has no name for it.
        """
        stem, _, kind = theirs.rpartition(".")
        numbers = NUMBER.findall(stem)
        template = _template(stem)
        if template not in self._names:
            raise CheckpointError(
                f"GGUF files of the architecture {self.layout.architectures[0]!r} have no name for "
                f"{theirs}; save the model as a Hugging Face folder"
            )
        ours = self._names[template].replace("{i}", numbers[0] if numbers else "")
        return f"{ours}.{kind}"

    def _wanted(self, name: str, ours: str) -> str:
        """Returns the type of a matrix, by its name and ours, before its width is looked at."""
        for pattern, type in reversed(self._overrides):
            if name_matches(ours, pattern):
                return type
        if name in AT_LEAST_SIX and self._type not in (*FULL, "q8_0"):
            return "q6_k"
        return self._type

    def _type_of(self, name: str, shape: Sequence[int], kind: str) -> str:
        if len(shape) < 2 or name.endswith(IN_FP32):
            return "f32"
        width = shape[-1]
        if kind in SMALLER and width % TYPES[kind].block:
            kind = SMALLER[kind]
        if kind in TYPES and width % TYPES[kind].block:
            kind = "f16"
        return kind


def _template(name: str) -> str:
    """Returns a name with its numbers as {i}, and {e} for the second."""
    return NUMBER.sub("{e}", NUMBER.sub("{i}", name, count=1), count=1)


def _add(writer: "gguf.GGUFWriter", key: str, value: Json) -> None:
    """Adds metadata in the type that llama.cpp's converter writes."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, str(value))


__all__ = ["Exported", "gguf_types", "save_gguf"]
