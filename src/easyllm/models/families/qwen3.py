"""Qwen3: the Llama architecture with QK norm and no biases by default."""

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
    window_of_layer,
    with_defaults,
    write_dense_model,
    write_windows,
)
from easyllm.models.families.gguf_layout import LLAMA_NAMES, QK_NORMS, GGUFLayout, read_llama
from easyllm.models.families.gguf_write import write_llama
from easyllm.models.families.qwen2 import DEFAULTS
from easyllm.nn.config import AttentionConfig, GLUConfig, ModelConfig, RMSNormConfig


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts a `Qwen3Config` to a `ModelConfig`."""
    hf = with_defaults(hf, DEFAULTS | {"head_dim": 128})
    refuse(hf, {"hidden_act": "silu"})
    bias = bool(hf.get("attention_bias", False))
    first, windows = hf["max_window_layers"], bool(hf["use_sliding_window"])
    norm = RMSNormConfig(eps=hf.get("rms_norm_eps", 1e-6))

    def layer(number: int) -> tuple[AttentionConfig, GLUConfig]:
        mixer = read_attention(
            hf,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=norm,
            window=window_of_layer(hf, number, slides=windows and number >= first),
        )
        return mixer, read_glu(hf)

    return read_model(hf, family="qwen3", layer=layer)


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a Qwen3 model."""
    mixer, _ = dense_layer(config)
    return write_dense_model(config, model_type="qwen3", architecture="Qwen3ForCausalLM") | {
        "attention_bias": mixer.qkv_bias,
        **write_windows(config),
    }


SIZES = {
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    }
}

FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    read_config=read_config,
    write_config=write_config,
    keymap=llama_keymap,
    sizes=SIZES,
    write_gguf=write_llama,
    gguf=GGUFLayout(
        architectures=("qwen3",),
        read_config=lambda metadata: read_llama(metadata, "qwen3"),
        names={**LLAMA_NAMES, **QK_NORMS},
    ),
)
