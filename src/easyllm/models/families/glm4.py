"""GLM-4 (`glm`) and GLM-4-0414 (`glm4`).

Partial RoPE rotates half of each head in interleaved pairs, and the gate and up projections are
fused in one tensor on disk. `glm4` also has a norm after each block (sandwich norm).
"""

from easyllm.checkpoint.keymap import Fused, KeyMap
from easyllm.core.json_types import JsonObject
from easyllm.models.families import glm
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
    with_defaults,
    write_dense_model,
)
from easyllm.models.families.rope_config import read_rope
from easyllm.nn.config import ModelConfig

_DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "attention_bias": True,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
}
"""Defaults of `GlmConfig` and `Glm4Config` that differ from Llama's."""
_SANDWICH = {
    "mixer_norm": "input_layernorm",
    "mixer_post_norm": "post_self_attn_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward_post_norm": "post_mlp_layernorm",
}


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts a `GlmConfig` or `Glm4Config`, or one of the older GLM, to a `ModelConfig`."""
    if glm.MARK in hf:
        return glm.read_config(hf)
    hf = with_defaults(hf, _DEFAULTS)
    refuse(hf, {"hidden_act": "silu"})
    width = hf.get("head_dim") or require(hf, "hidden_size") // require(hf, "num_attention_heads")
    rope = read_rope(hf, width, interleaved=True, share=0.5)
    mixer = read_attention(hf, position=rope, qkv_bias=bool(hf["attention_bias"]))
    family = str(hf["model_type"])
    return read_model(
        hf,
        family=family,
        layer=lambda _: (mixer, read_glu(hf)),
        norm_placement="sandwich" if family == "glm4" else "pre",
    )


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a GLM-4 model."""
    mixer, _ = dense_layer(config)
    architecture = "Glm4ForCausalLM" if config.family == "glm4" else "GlmForCausalLM"
    return write_dense_model(config, model_type=config.family, architecture=architecture) | {
        "attention_bias": mixer.qkv_bias,
    }


def keymap(config: ModelConfig) -> KeyMap:
    """Returns Llama's key map with the gate and up projections fused in one tensor."""
    width = dense_layer(config)[1].intermediate_size
    fused = Fused(
        (
            "layers.{i}.feed_forward.gate_proj.weight",
            "layers.{i}.feed_forward.up_proj.weight",
        ),
        "model.layers.{i}.mlp.gate_up_proj.weight",
        (width, width),
    )
    norms = _SANDWICH if config.family == "glm4" else None
    return llama_keymap(config, norms=norms, more=[fused])


GLM4, GLM = (
    Family(
        name=name,
        model_types=(name,),
        read_config=read_config,
        write_config=write_config,
        keymap=keymap,
    )
    for name in ("glm4", "glm")
)
