"""A family's layout in GGUF files: llama.cpp's names of its architecture and tensors, its metadata as `config.json`.

Each family's file defines one `GGUFLayout`; the functions below read what most architectures share.
Sources: the GGUF specification (keys, tensor names), llama.cpp's `llama-model.cpp` (defaults, which key is honoured how).
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from easyllm.core.errors import CheckpointError
from easyllm.nn.config import Llama3Scaling
from easyllm.nn.rope_scaling import frequencies, llama3_frequencies

Transform = Callable[[Tensor, Mapping[str, Any]], Tensor]
"""The file's tensor and the `config.json` to HF's tensor; it works on the meta device too, which gives the shape."""

ROPE_FACTORS = "rope_freqs.weight"
WITHOUT_EFFECT = frozenset(
    {
        "context_length",
        "vocab_size",  # the tokens are counted instead
        "tensor_data_layout",
        "pooling_type",  # of embeddings made from the hidden states
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
"""Values with which a key that is not implemented says nothing; of all other keys 0, false and the empty string."""
_SILENT = (0, "")


class GGUFMetadata:
    """The metadata of one architecture, which note the keys that were read so that the others can be refused.

    Attributes:
        tensors: names of the file's tensors.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, Any],
        load: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.architecture = str(values.get("general.architecture"))
        self.tensors, self._values, self._load = tensors, values, load
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`: a list of one value for every layer is that value, an fp32 number the
        shortest decimal that rounds to it (9.99999974e-06 is 1e-05).

        Raises:
            CheckpointError: the layers differ.
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

    def need(self, key: str) -> Any:
        """The value of a key that must be there.

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
        """Refuses any other value of a key than the expected ones (or none).

        Raises:
            CheckpointError: the key has another value.
        """
        if self.get(key, expected[0]) not in expected:
            raise self.refusal(key, " or ".join(map(repr, expected)))

    def load(self, name: str) -> Tensor:
        """A tensor of the file in fp32."""
        assert self._load is not None, "metadata whose tensors are listed can load them"
        return self._load(name)

    def refuse_unread(self) -> None:
        """Refuses keys of the architecture that nothing has read, unless they say nothing about the logits.

        Raises:
            CheckpointError: a key may change the result.
        """
        for name, value in self._values.items():
            architecture, _, key = name.partition(".")
            if architecture != self.architecture or key in self._read | WITHOUT_EFFECT:
                continue
            values = value if isinstance(value, list) else [value]
            if any(v not in NEUTRAL_VALUES.get(key, _SILENT) for v in values):
                raise self.refusal(key, "no such key")

    def refusal(self, key: str, expected: str) -> CheckpointError:
        """The error that names a key and its value."""
        value = self._values.get(f"{self.architecture}.{key}")
        return CheckpointError(
            f"the GGUF file sets {self.architecture}.{key}={_short(value)}, which is not implemented for this architecture "
            f"(expected {expected}); load the model's Hugging Face folder if its family is read"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFLayout:
    """A family in GGUF files.

    Attributes:
        architectures: values of `general.architecture` it reads.
        read_config: the metadata as `config.json`, without vocabulary and token ids (which every file says alike).
        names: HF's name of each tensor without `.weight` or `.bias`, by the file's; `{i}` is the number of a layer. Where
            HF's has an `{e}`, the file stacks the experts' matrices along a dimension of their own.
        transforms: by the file's name of a tensor, what turns it into HF's.
        ignored: tensors that are not parameters: unused, or already read by `read_config`.
    """

    architectures: tuple[str, ...]
    read_config: Callable[[GGUFMetadata], dict[str, Any]]
    names: Mapping[str, str]
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset({"blk.{i}.attn_rot_embd", "rope_freqs"})

    def locate(self, name: str) -> tuple[str, Transform | None] | None:
        """HF's name of a tensor of the file and what turns it into HF's; None where it is ignored.

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
"""What most architectures share: llama.cpp's names and HF's."""
QK_NORMS: Mapping[str, str] = {
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
}
"""Norms of queries and keys."""


def read_llama(metadata: GGUFMetadata, model_type: str) -> dict[str, Any]:
    """The keys of `config.json` shared by models of the Llama architecture."""
    return read_sizes(metadata, model_type) | {
        "rms_norm_eps": metadata.need("attention.layer_norm_rms_epsilon")
    }


def read_sizes(metadata: GGUFMetadata, model_type: str) -> dict[str, Any]:
    """As `read_llama`, without the norm."""
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


def read_rope(metadata: GGUFMetadata, width: int) -> dict[str, Any]:
    """The rotary positions: their base, the scaling by metadata, and the factors that a tensor divides frequencies by.

    Raises:
        CheckpointError: they are scaled in a way that is not implemented.
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


def _read_scaling(metadata: GGUFMetadata) -> dict[str, Any] | None:
    """A file that names no kind scales linearly, by 1 where it names no factor (llama.cpp)."""
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


def _scaling_by_factors(factors: Tensor, theta: float, width: int) -> dict[str, Any] | None:
    """Factors as `config.json` says them: Llama 3's rule where they are its own (its converter writes nothing else),
    so that the model can be saved for other tools, else the factors themselves.

    Raises:
        CheckpointError: there are not as many as pairs of dims.
    """
    if factors.numel() != width // 2:
        raise CheckpointError(
            f"the tensor {ROPE_FACTORS} holds {factors.numel()} factors, expected {width // 2}; convert the file again"
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
    """Rows of a query or key projection from llama.cpp's interleaved pairs (2i, 2i+1) to HF's (i, i+d/2)."""
    pairs = weight.view(num_heads, -1, 2, *weight.shape[1:])  # [heads, d/2, 2, ...]
    return pairs.transpose(1, 2).reshape(weight.shape)


def half_split(heads: str) -> Transform:
    """`half_split_rows` by as many heads as the key `heads` of `config.json` says."""
    return lambda tensor, config: half_split_rows(tensor, config[heads])


def minus_one(tensor: Tensor, _config: Mapping[str, Any]) -> Tensor:
    """The weight of a norm that HF keeps as its difference from 1, and the file whole (Gemma)."""
    return tensor - 1


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
