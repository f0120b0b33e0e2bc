"""A GGUF file as if it were a Hugging Face folder: its metadata as `config.json`, its tensors by HF's names."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from easyllm.checkpoint.gguf import GGUFFile
from easyllm.core.errors import CheckpointError

_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IGNORED = ("rope_freqs.weight",)
ARCHITECTURES = ("llama",)


def hf_config(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` the metadata stand for.

    Raises:
        CheckpointError: the architecture is not known, or a key is missing.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"GGUF architecture {architecture!r} is not known; known are {', '.join(ARCHITECTURES)}"
        )

    def need(key: str) -> Any:
        value = metadata.get(f"{architecture}.{key}")
        if value is None:
            raise CheckpointError(f"the GGUF file has no {architecture}.{key}; convert it again")
        return value

    for key in ("rope.scaling.type", "expert_count"):
        if metadata.get(f"{architecture}.{key}") not in (None, "none", 0):
            raise CheckpointError(f"GGUF files with {architecture}.{key} are not read yet")
    heads = need("attention.head_count")
    hidden = need("embedding_length")
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    return {
        "model_type": "llama",
        "vocab_size": len(tokens) or need("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{architecture}.attention.head_count_kv", heads),
        "head_dim": metadata.get(f"{architecture}.attention.key_length", hidden // heads),
        "max_position_embeddings": need("context_length"),
        # the file keeps fp32; the model was trained with the shortest decimal that rounds to it
        "rms_norm_eps": _shortest(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": metadata.get(f"{architecture}.rope.freq_base", 10000.0),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_ids(metadata),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


class GGUFTensors:
    """The tensors of a GGUF file by HF's names."""

    def __init__(self, file: GGUFFile, config: Mapping[str, Any]) -> None:
        self._file = file
        self._heads = {
            "attn_q": config["num_attention_heads"],
            "attn_k": config["num_key_value_heads"],
        }
        self._names = {hf_name(name): name for name in file.tensors if name not in _IGNORED}
        self.shapes = {hf: file.tensors[name].shape for hf, name in self._names.items()}

    def load(self, name: str) -> Tensor:
        """The tensor HF calls `name`, in fp32."""
        theirs = self._names[name]
        tensor = self._file.load(theirs, torch.float32)
        kind = theirs.split(".")[-2]
        if kind in self._heads:
            return half_split_rows(tensor, self._heads[kind])
        return tensor


def half_split_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key projection from llama.cpp's interleaved pairs (2i, 2i+1) to HF's (i, i+d/2)."""
    pairs = weight.view(num_heads, -1, 2, *weight.shape[1:])  # [heads, d/2, 2, ...]
    return pairs.transpose(1, 2).reshape(weight.shape)


def hf_name(name: str) -> str:
    """HF's name of a GGUF tensor (an unknown one keeps its name and is reported as left over)."""
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if found and found.group(2) in _LAYER:
        return f"model.layers.{found.group(1)}.{_LAYER[found.group(2)]}.{found.group(3)}"
    stem, _, kind = name.rpartition(".")
    return f"{_TOP[stem]}.{kind}" if stem in _TOP else name


def _eos_ids(metadata: Mapping[str, Any]) -> list[int]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    return list(dict.fromkeys(i for i in found if isinstance(i, int)))


def _shortest(value: float) -> float:
    """The shortest decimal whose fp32 rounding is `value` (9.99999974e-06 → 1e-05)."""
    import numpy as np

    return float(str(np.float32(value)))
