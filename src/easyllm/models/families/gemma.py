"""Gemma 1 and 2: norms with weight 1 + w, scaled embeddings, GEGLU.

Gemma 2 adds norms before and after each block (sandwich norm), logit soft-capping and
sliding-window attention in every second layer.
"""

from easyllm.checkpoint.keymap import KeyMap
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
    require,
    window_of_layer,
    with_defaults,
    write_model,
    write_windows,
)
from easyllm.models.families.gemma_gguf import GGUF, GGUF2, write_gguf2
from easyllm.models.families.gguf_write import write_llama
from easyllm.nn.config import AttentionConfig, GLUConfig, ModelConfig, RMSNormConfig

SANDWICH = {
    "mixer_norm": "input_layernorm",
    "mixer_post_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_post_norm": "post_feedforward_layernorm",
}
_GELU = "gelu_pytorch_tanh"
_DEFAULTS = {
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_SECOND = _DEFAULTS | {
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
"""`_DEFAULTS`, `_SECOND`: defaults of `GemmaConfig`, `Gemma2Config` that differ from Llama's."""


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts a `GemmaConfig` or `Gemma2Config` to a `ModelConfig`."""
    second = hf.get("model_type") == "gemma2"
    hf = with_defaults(hf, _SECOND if second else _DEFAULTS)
    if hf.get("hidden_act") != "gelu":  # early configurations say gelu but mean gelu_pytorch_tanh
        refuse(hf, {"hidden_act": _GELU})
    refuse(hf, {"hidden_activation": _GELU, "use_bidirectional_attention": False})
    bias = bool(hf.get("attention_bias", False))
    changes: JsonObject = {"qkv_bias": bias, "out_bias": bias}
    if second:
        changes["scale"] = require(hf, "query_pre_attn_scalar") ** -0.5
        changes["softcap"] = hf.get("attn_logit_softcapping")

    def layer(number: int) -> tuple[AttentionConfig, GLUConfig]:
        window = window_of_layer(hf, number, slides=number % 2 == 0) if second else None
        return read_attention(hf, window=window, **changes), read_glu(hf, activation="gelu_tanh")

    return read_model(
        hf,
        family="gemma2" if second else "gemma",
        layer=layer,
        norm_placement="sandwich" if second else "pre",
        norm=RMSNormConfig(eps=hf.get("rms_norm_eps", 1e-6), unit_offset=True),
        embedding_scale=require(hf, "hidden_size") ** 0.5,
        logit_softcap=hf.get("final_logit_softcapping") if second else None,
    )


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a Gemma model."""
    mixer, feed_forward = dense_layer(config)
    written = {
        "intermediate_size": feed_forward.intermediate_size,
        "attention_bias": mixer.qkv_bias,
        "hidden_act": _GELU,
        "hidden_activation": _GELU,
    }
    if config.family == "gemma":
        return write_model(config, model_type="gemma", architecture="GemmaForCausalLM") | written
    scale = mixer.scale or mixer.head_dim**-0.5
    written |= {
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": mixer.softcap,
        "final_logit_softcapping": config.logit_softcap,
        **write_windows(config),
    }
    written.pop("use_sliding_window", None)
    return write_model(config, model_type="gemma2", architecture="Gemma2ForCausalLM") | written


def keymap(config: ModelConfig) -> KeyMap:
    """Returns Llama's key map; for Gemma 2 with four norms per layer."""
    return llama_keymap(config, norms=SANDWICH if config.family == "gemma2" else None)


GEMMA, GEMMA2 = (
    Family(
        name=name,
        model_types=(name,),
        read_config=read_config,
        write_config=write_config,
        keymap=keymap,
        gguf=gguf,
        write_gguf=write,
    )
    for name, gguf, write in (("gemma", GGUF, write_llama), ("gemma2", GGUF2, write_gguf2))
)
