"""The layout of model families in GGUF files, and readers of the metadata that most share.

A family's module defines a `GGUFLayout`: llama.cpp's names of the architecture and its tensors, and
the conversion of the metadata to `config.json` values. Sources: the GGUF specification (keys,
tensor names) and llama.cpp's `llama-model.cpp` (defaults and the interpretation of keys).
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from easyllm.checkpoint.keymap import Fused
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import Json, JsonMapping, JsonObject
from easyllm.nn.position_config import Llama3Scaling
from easyllm.nn.rope_scaling import frequencies, llama3_frequencies

Transform = Callable[[Tensor, JsonMapping], Tensor]
"""Converts a tensor of the file, given the `config.json` values, to HF's tensor. It must also work
on the meta device, where it is used to compute the shape."""

ROPE_FACTORS = "rope_freqs.weight"
WITHOUT_EFFECT = frozenset(
    {
        "context_length",
        "vocab_size",  # the number of tokens is used instead
        "tensor_data_layout",
        "pooling_type",  # concerns embeddings computed from the hidden states
        "rope.scaling.finetuned",
    }
)
"""Keys of an architecture that do not change the logits."""
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.output_scale": (0, 1),
    "embedding_scale": (0, 1),
    "expert_weights_scale": (0, 1),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
}
"""Values at which an unimplemented key has no effect; for all other keys 0, false and the empty
string."""
_SILENT = (0, "")


class GGUFMetadata:
    """The metadata of one architecture; it records which keys were read and can reject the others.

    Attributes:
        architecture: the value of `general.architecture`.
        tensors: the tensors of the file by name.
    """

    def __init__(
        self,
        values: JsonMapping,
        tensors: JsonMapping,
        load: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.architecture = str(values.get("general.architecture"))
        self.tensors, self._values, self._load = tensors, values, load
        self._read: set[str] = set()

    def get(self, key: str, default: object = None) -> Json:
        """Returns the value of `<architecture>.<key>`, or `default` if it is missing.

        A per-layer list of equal values is returned as that single value, and an fp32 value as the
        shortest decimal that rounds to it (9.99999974e-06 becomes 1e-05).

        Raises:
            CheckpointError: the values of the layers differ.
        """
        self._read.add(key)
        value = self._values.get(f"{self.architecture}.{key}")
        if isinstance(value, list) and value:
            if any(item != value[0] for item in value):
                raise self.refusal(key, "the same value for every layer")
            value = value[0]
        if value is None:
            return default
        return _shortest(value) if isinstance(value, float) else value

    def need(self, key: str) -> Json:
        """Returns the value of a required key.

        Raises:
            CheckpointError: it is missing.
        """
        value = self.get(key)
        if value is None:
            raise CheckpointError(
                f"the GGUF file has no {self.architecture}.{key}; convert it again"
            )
        return value

    def expect(self, key: str, *expected: Any) -> None:
        """Checks that a key is missing or has one of the expected values.

        Raises:
            CheckpointError: it has another value.
        """
        if self.get(key, expected[0]) not in expected:
            raise self.refusal(key, " or ".join(map(repr, expected)))

    def load(self, name: str) -> Tensor:
        """Loads a tensor of the file in fp32."""
        assert self._load is not None, "a loader is required when the file lists tensors"
        return self._load(name)

    def reject_unread(self) -> None:
        """Rejects keys of the architecture that were not read and may affect the logits.

        Raises:
            CheckpointError: there is such a key.
        """
        for name, value in self._values.items():
            architecture, _, key = name.partition(".")
            if architecture != self.architecture or key in self._read | WITHOUT_EFFECT:
                continue
            values = value if isinstance(value, list) else [value]
            if any(v not in NEUTRAL_VALUES.get(key, _SILENT) for v in values):
                raise self.refusal(key, "no such key")

    def refusal(self, key: str, expected: str) -> CheckpointError:
        """Returns the error for an unsupported value of a key."""
        value = self._values.get(f"{self.architecture}.{key}")
        return CheckpointError(
            f"the GGUF file sets {self.architecture}.{key}={_short(value)}, which is not "
            f"implemented for this architecture (expected {expected}); load the model's Hugging "
            "Face folder if its family is supported"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Divided:
    """A matrix of Hugging Face files that GGUF files store in parts.

    Its rows are groups (heads), and each group has some rows of every part in turn.

    Attributes:
        parts: HF-like names of the parts, without `.weight`, with the `config.json` keys of their
            number of rows in a group.
        groups: the `config.json` key of the number of groups.
    """

    parts: Mapping[str, str]
    groups: str

    def rule(self, config: JsonMapping) -> Fused:
        """Returns the rule that splits the matrix and joins its parts."""
        sizes = tuple(config[key] for key in self.parts.values())
        return Fused(tuple(self.parts), "", sizes, groups=config[self.groups])


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFLayout:
    """The layout of a family in GGUF files.

    Attributes:
        architectures: the values of `general.architecture` that it reads.
        read_config: converts the metadata to `config.json` values, without vocabulary size and
            token ids (which all files store in the same way).
        names: maps the file's tensor names to HF's, both without `.weight` or `.bias`; `{i}` is the
            layer index. If the HF name contains `{e}`, the file stacks the experts' matrices along
            a separate first dimension.
        transforms: conversions to HF's tensors, by the file's tensor name.
        untransforms: their inverses, for writing.
        divided: matrices that the file stores in parts, by HF name without `.weight`; `names` has
            the parts.
        ignored: tensors that are not parameters: unused, or already read by `read_config`.
    """

    architectures: tuple[str, ...]
    read_config: Callable[[GGUFMetadata], JsonObject]
    names: Mapping[str, str]
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    untransforms: Mapping[str, Transform] = field(default_factory=dict)
    divided: Mapping[str, Divided] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset({"blk.{i}.attn_rot_embd", "rope_freqs"})

    def locate(self, name: str) -> tuple[str, Transform | None] | None:
        """Returns the HF name of a tensor and its conversion; None if the tensor is ignored.

        Raises:
            LookupError: the family has no such tensor.
        """
        stem, _, kind = name.rpartition(".")
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", stem)
        template = re.sub(r"(?<=\.)\d+(?=\.)", "{i}", stem, count=1)
        if template in self.ignored and kind == "weight":
            return None
        if template not in self.names or kind not in ("weight", "bias"):
            raise LookupError(name)
        theirs = self.names[template].replace("{i}", numbers[0] if numbers else "{i}")
        return f"{theirs}.{kind}", self.transforms.get(template)


LLAMA_NAMES: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
}
"""Tensor names shared by most architectures: llama.cpp's to HF's."""
QK_NORMS: Mapping[str, str] = {
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
}
"""Tensor names of the QK norms: llama.cpp's to HF's."""


def read_llama(metadata: GGUFMetadata, model_type: str) -> JsonObject:
    """Returns the `config.json` values shared by Llama-style models."""
    return read_sizes(metadata, model_type) | {
        "rms_norm_eps": metadata.need("attention.layer_norm_rms_epsilon")
    }


def read_sizes(metadata: GGUFMetadata, model_type: str) -> JsonObject:
    """Returns the values of `read_llama` without those of the norm."""
    heads, hidden = metadata.need("attention.head_count"), metadata.need("embedding_length")
    width = metadata.get("attention.key_length", hidden // heads)
    metadata.expect("attention.value_length", width)
    metadata.expect("rope.dimension_count", width)
    if not math.isclose(metadata.get("attention.scale") or width**-0.5, width**-0.5, rel_tol=1e-6):
        raise metadata.refusal("attention.scale", f"{width}**-0.5")
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": metadata.need("feed_forward_length"),
        "num_hidden_layers": metadata.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": metadata.need("context_length"),
        "tie_word_embeddings": "output.weight" not in metadata.tensors,
        **read_rope(metadata, width),
    }


def read_rope(metadata: GGUFMetadata, width: int) -> JsonObject:
    """Returns the `rope_theta` and `rope_scaling` values of `config.json`.

    The scaling comes from the metadata and from the tensor `rope_freqs.weight`, whose factors
    divide the RoPE frequencies.

    Args:
        metadata: the metadata of the file.
        width: the head dimension.

    Raises:
        CheckpointError: the RoPE scaling is not implemented.
    """
    theta = float(metadata.get("rope.freq_base", 10000.0))
    scaling = _read_scaling(metadata)
    if ROPE_FACTORS in metadata.tensors:
        factors = metadata.load(ROPE_FACTORS)
        if scaling is not None and scaling["rope_type"] != "linear":
            raise metadata.refusal("rope.scaling.type", f"none next to the tensor {ROPE_FACTORS}")
        factors = factors * (1.0 if scaling is None else scaling["factor"])
        scaling = _scaling_by_factors(factors, theta, width)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _read_scaling(metadata: GGUFMetadata) -> JsonObject | None:
    """Reads the RoPE scaling; the defaults are linear with factor 1, as in llama.cpp."""
    kind = metadata.get("rope.scaling.type", "linear")
    factor = metadata.get("rope.scaling.factor") or metadata.get("rope.scale_linear") or 1.0
    length = metadata.get("rope.scaling.original_context_length")
    attention = metadata.get("rope.scaling.attn_factor", 1.0)
    if kind != "yarn" and attention not in (0, 1):
        raise metadata.refusal("rope.scaling.attn_factor", "1.0 without YaRN")
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise metadata.refusal("rope.scaling.type", "none, linear or yarn")
    metadata.expect("rope.scaling.yarn_ext_factor", 1, -1)
    attention = (attention or 1.0) * metadata.get("rope.scaling.yarn_attn_factor", 1.0)
    values = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": length or metadata.need("context_length"),
        "beta_fast": metadata.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": metadata.get("rope.scaling.yarn_beta_slow", 1.0),
    }
    if attention != 1:
        values["attention_factor"] = attention * (0.1 * math.log(max(factor, 1.0)) + 1)
    return values


def _scaling_by_factors(factors: Tensor, theta: float, width: int) -> JsonObject | None:
    """Returns the RoPE scaling for explicit frequency factors as `config.json` stores it.

    If the factors follow Llama 3's rule (its converter writes only the factors), the result is that
    rule, so that the model can be saved for other tools. Otherwise it contains the factors.

    Raises:
        CheckpointError: the number of factors is not the number of rotated pairs.
    """
    if factors.numel() != width // 2:
        raise CheckpointError(
            f"the tensor {ROPE_FACTORS} contains {factors.numel()} factors, expected {width // 2}; "
            "convert the file again"
        )
    if bool((factors == 1).all()):
        return None
    plain = frequencies(theta, width)
    rule = {
        "factor": round(float(factors.max()), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    for power in range(5, 21):
        scaling = Llama3Scaling(**rule, original_max_seq_len=2**power)
        expected = plain / llama3_frequencies(theta, width, scaling)
        if torch.allclose(expected, factors, rtol=1e-5, atol=0):
            return {"rope_type": "llama3", **rule, "original_max_position_embeddings": 2**power}
    return {"rope_type": "factors", "factors": factors.flatten().tolist()}


def half_split_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Permutes the rows of a query or key projection for HF's RoPE.

    llama.cpp rotates interleaved pairs (2i, 2i+1); HF rotates the pairs (i, i+d/2).
    """
    pairs = weight.view(num_heads, -1, 2, *weight.shape[1:])  # [heads, d/2, 2, ...]
    return pairs.transpose(1, 2).reshape(weight.shape)


def half_split(heads: str) -> Transform:
    """Returns `half_split_rows` as a transform; the head count is the `config.json` key `heads`."""
    return lambda tensor, config: half_split_rows(tensor, config[heads])


def minus_one(tensor: Tensor, _config: JsonMapping) -> Tensor:
    """Converts the norm weight 1 + w of the file to the w that HF stores (Gemma)."""
    return tensor - 1


def plus_one(tensor: Tensor, _config: JsonMapping) -> Tensor:
    """The inverse of `minus_one`."""
    return tensor + 1


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
