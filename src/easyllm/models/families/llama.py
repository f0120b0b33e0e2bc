"""Llama 1, 2 and 3, and models with the same architecture: SmolLM2, TinyLlama."""

from typing import Any

from easyllm.core.json_types import JsonObject
from easyllm.models.families.family import (
    Family,
    HFConfig,
    dense_layer,
    llama_keymap,
    read_attention,
    read_glu,
    read_model,
    refuse,
    with_defaults,
    write_dense_model,
)
from easyllm.models.families.gguf_layout import (
    LLAMA_NAMES,
    GGUFLayout,
    GGUFMetadata,
    half_split,
    read_llama,
)
from easyllm.models.families.gguf_write import interleave, write_llama
from easyllm.nn.config import ModelConfig


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts a `LlamaConfig` to a `ModelConfig`."""
    hf = with_defaults(hf, {"bos_token_id": 1, "eos_token_id": 2})
    refuse(hf, {"hidden_act": "silu"})
    bias = bool(hf.get("attention_bias", False))
    mixer = read_attention(hf, qkv_bias=bias, out_bias=bias)
    feed_forward = read_glu(hf, bias=bool(hf.get("mlp_bias", False)))
    return read_model(hf, family="llama", layer=lambda _: (mixer, feed_forward))


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a Llama model."""
    mixer, feed_forward = dense_layer(config)
    return write_dense_model(config, model_type="llama", architecture="LlamaForCausalLM") | {
        "attention_bias": mixer.qkv_bias,
        "mlp_bias": feed_forward.bias,
    }


def read_gguf(metadata: GGUFMetadata) -> JsonObject:
    """Converts GGUF metadata of the architecture `llama`.

    A file with experts is read as Mixtral, a file with a sliding window as Mistral.
    """
    bias = "blk.0.attn_q.bias" in metadata.tensors
    hf = read_llama(metadata, "llama") | {
        "attention_bias": bias,
        "mlp_bias": "blk.0.ffn_up.bias" in metadata.tensors,
    }
    window = metadata.get("attention.sliding_window")
    if experts := metadata.get("expert_count", 0):
        metadata.expect("expert_gating_func", 1)  # softmax
        chosen = metadata.need("expert_used_count")
        hf |= {"num_local_experts": experts, "num_experts_per_tok": chosen}
        return hf | {"model_type": "mixtral", "sliding_window": window or None}
    return hf | {"model_type": "mistral", "sliding_window": window} if window else hf


def _size(layers: int, hidden: int, heads: int, kv: int, ff: int, **more: Any) -> JsonObject:
    return {
        "model_type": "llama",
        "vocab_size": 32000,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ff,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    } | more


_LLAMA1 = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_LLAMA3 = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
_SCALED = {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SIZES = {
    "llama-7b": _size(32, 4096, 32, 32, 11008, **_LLAMA1),
    "llama-13b": _size(40, 5120, 40, 40, 13824, **_LLAMA1),
    "llama-33b": _size(60, 6656, 52, 52, 17920, **_LLAMA1),
    "llama-65b": _size(80, 8192, 64, 64, 22016, **_LLAMA1),
    "llama2-7b": _size(32, 4096, 32, 32, 11008),
    "llama2-13b": _size(40, 5120, 40, 40, 13824),
    "llama2-70b": _size(80, 8192, 64, 8, 28672),
    "llama3-8b": _size(32, 4096, 32, 8, 14336, **_LLAMA3),
    "llama3-70b": _size(80, 8192, 64, 8, 28672, **_LLAMA3),
    "llama3.1-8b": _size(32, 4096, 32, 8, 14336, **_LLAMA3 | _SCALED),
    "tinyllama-1.1b": _size(22, 2048, 32, 4, 5632, max_position_embeddings=2048),
    "smollm2-135m": _size(
        30,
        576,
        9,
        3,
        1536,
        vocab_size=49152,
        tie_word_embeddings=True,
        rope_theta=100000.0,
        max_position_embeddings=8192,
    ),
}

_EXPERTS = {
    "blk.{i}.ffn_gate_inp": "model.layers.{i}.block_sparse_moe.gate",
    "blk.{i}.ffn_gate_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
    "blk.{i}.ffn_down_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
    "blk.{i}.ffn_up_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
}
_HEADS = (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
FAMILY = Family(
    name="llama",
    model_types=("llama",),
    read_config=read_config,
    write_config=write_config,
    keymap=llama_keymap,
    sizes=SIZES,
    gguf=GGUFLayout(
        architectures=("llama",),
        read_config=read_gguf,
        names={**LLAMA_NAMES, **_EXPERTS},
        transforms={f"blk.{{i}}.attn_{part}": half_split(heads) for part, heads in _HEADS},
        untransforms={f"blk.{{i}}.attn_{part}": interleave(heads) for part, heads in _HEADS},
    ),
    write_gguf=write_llama,
)
