"""Gemma 1 and 2: norms with weight 1 + w, scaled embeddings, GEGLU; Gemma 2 with norms on both sides, soft caps and
every second layer looking through a window."""

from typing import Any

from easyllm.checkpoint.keymap import KeyMap
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
    write_model,
    write_windows,
)
from easyllm.nn.config import ModelConfig, RMSNormConfig

_SANDWICH = {
    "mixer_norm": "input_layernorm",
    "mixer_post_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_post_norm": "post_feedforward_layernorm",
}
_GELU = ("gelu_pytorch_tanh", "gelu", None)  # Gemma 1 says gelu and means its tanh form


def read_config(hf: HFConfig) -> ModelConfig:
    """A `GemmaConfig` or `Gemma2Config` as `ModelConfig`."""
    second = hf.get("model_type") == "gemma2"
    for key in ("hidden_act", "hidden_activation"):
        if hf.get(key) not in _GELU:
            refuse(hf, {key: _GELU[0]})
    refuse(hf, {"use_bidirectional_attention": None})
    bias = bool(hf.get("attention_bias", False))
    changes: dict[str, Any] = {"qkv_bias": bias, "out_bias": bias}
    if second:
        changes["scale"] = require(hf, "query_pre_attn_scalar") ** -0.5
        changes["softcap"] = hf.get("attn_logit_softcapping")
    return read_model(
        {"tie_word_embeddings": True, **hf},
        family="gemma2" if second else "gemma",
        layer=lambda i: (
            read_attention(hf, window=window_of_layer(hf, i) if second else None, **changes),
            read_glu(hf, activation="gelu_tanh"),
        ),
        norm_placement="sandwich" if second else "pre",
        norm=RMSNormConfig(eps=hf.get("rms_norm_eps", 1e-6), unit_offset=True),
        embedding_scale=require(hf, "hidden_size") ** 0.5,
        logit_softcap=hf.get("final_logit_softcapping"),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Its `config.json`."""
    mixer, feed_forward = dense_layer(config)
    written = {
        "intermediate_size": feed_forward.intermediate_size,
        "attention_bias": mixer.qkv_bias,
        "hidden_act": _GELU[0],
        "hidden_activation": _GELU[0],
    }
    if config.family == "gemma":
        return write_model(config, model_type="gemma", architecture="GemmaForCausalLM") | written
    assert mixer.scale is not None
    written |= {
        "query_pre_attn_scalar": round(mixer.scale**-2),
        "attn_logit_softcapping": mixer.softcap,
        "final_logit_softcapping": config.logit_softcap,
        **write_windows(config),
    }
    written.pop("use_sliding_window", None)
    return write_model(config, model_type="gemma2", architecture="Gemma2ForCausalLM") | written


def keymap(config: ModelConfig) -> KeyMap:
    """Names on disk: Llama's; Gemma 2 names four norms a layer."""
    return llama_keymap(config, norms=_SANDWICH if config.family == "gemma2" else None)


FAMILIES = tuple(
    Family(
        name=name,
        model_types=(name,),
        read_config=read_config,
        write_config=write_config,
        keymap=keymap,
    )
    for name in ("gemma", "gemma2")
)
