"""Qwen1.5 and Qwen2/2.5: the Llama architecture with biases on q, k and v."""

from typing import Any

from easyllm.core.json_types import JsonObject
from easyllm.models.families.family import (
    Family,
    HFConfig,
    llama_keymap,
    read_attention,
    read_glu,
    read_model,
    refuse,
    window_of_layer,
    with_defaults,
    write_dense_model,
    write_windows,
)
from easyllm.models.families.gguf_layout import LLAMA_NAMES, GGUFLayout, read_llama
from easyllm.models.families.gguf_write import write_llama
from easyllm.nn.config import ModelConfig

DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
"""Defaults of `Qwen2Config` (and of `Qwen3Config`) that differ from Llama's."""


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts a `Qwen2Config` to a `ModelConfig`; layers may have different windows."""
    hf = with_defaults(hf, DEFAULTS)
    refuse(hf, {"hidden_act": "silu"})
    first, windows = hf["max_window_layers"], bool(hf["use_sliding_window"])
    return read_model(
        hf,
        family="qwen2",
        layer=lambda i: (
            read_attention(
                hf, qkv_bias=True, window=window_of_layer(hf, i, slides=windows and i >= first)
            ),
            read_glu(hf),
        ),
    )


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a Qwen2 model."""
    return write_dense_model(config, model_type="qwen2", architecture="Qwen2ForCausalLM") | {
        **write_windows(config),
    }


def _size(
    layers: int, hidden: int, heads: int, kv: int, ff: int, vocab: int, **more: Any
) -> JsonObject:
    return {
        "model_type": "qwen2",
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ff,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
    } | more


SIZES = {
    "qwen1.5-0.5b": _size(24, 1024, 16, 16, 2816, 151936, tie_word_embeddings=True),
    "qwen1.5-1.8b": _size(24, 2048, 16, 16, 5504, 151936),
    "qwen1.5-4b": _size(40, 2560, 20, 20, 6912, 151936),
    "qwen1.5-7b": _size(32, 4096, 32, 32, 11008, 151936),
    "qwen1.5-14b": _size(40, 5120, 40, 40, 13696, 152064),
    "qwen1.5-32b": _size(64, 5120, 40, 8, 27392, 152064),
    "qwen1.5-72b": _size(80, 8192, 64, 64, 24576, 152064),
    "qwen2.5-0.5b": _size(24, 896, 14, 2, 4864, 151936, tie_word_embeddings=True),
    "qwen2.5-7b": _size(28, 3584, 28, 4, 18944, 152064),
}

FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    read_config=read_config,
    write_config=write_config,
    keymap=llama_keymap,
    sizes=SIZES,
    write_gguf=write_llama,
    gguf=GGUFLayout(
        architectures=("qwen2",),
        read_config=lambda metadata: read_llama(metadata, "qwen2"),
        names=LLAMA_NAMES,
    ),
)
