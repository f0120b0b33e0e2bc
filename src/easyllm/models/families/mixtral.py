"""Mixtral: Mistral with a mixture of experts (MoE) in every layer.

The router's softmax covers only the selected experts (two by default).
"""

from easyllm.checkpoint.keymap import KeyMap
from easyllm.core.json_types import JsonObject
from easyllm.models.families.family import (
    Family,
    HFConfig,
    expect_part,
    llama_keymap,
    read_attention,
    read_glu,
    read_model,
    refuse,
    require,
    with_defaults,
    write_model,
)
from easyllm.models.families.gguf_write import write_mixtral
from easyllm.nn.config import AttentionConfig, ModelConfig, MoEConfig

DEFAULTS = {
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Defaults of `MixtralConfig` that differ from Llama's."""


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts a `MixtralConfig` to a `ModelConfig`."""
    hf = with_defaults(hf, DEFAULTS)
    refuse(hf, {"hidden_act": "silu", "router_jitter_noise": 0.0})
    mixer = read_attention(hf, window=hf.get("sliding_window"))
    experts = MoEConfig(
        num_experts=require(hf, "num_local_experts"),
        experts_per_token=require(hf, "num_experts_per_tok"),
        expert=read_glu(hf),
        routing="topk_softmax",
        load_balancing=require(hf, "router_aux_loss_coef"),
    )
    return read_model(hf, family="mixtral", layer=lambda _: (mixer, experts))


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a Mixtral model."""
    mixer = expect_part(config.layers[0].mixer, AttentionConfig)
    experts = expect_part(config.layers[0].feed_forward, MoEConfig)
    return write_model(config, model_type="mixtral", architecture="MixtralForCausalLM") | {
        "intermediate_size": experts.expert.intermediate_size,
        "hidden_act": "silu",
        "sliding_window": mixer.window,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "router_aux_loss_coef": experts.load_balancing,
    }


def keymap(config: ModelConfig) -> KeyMap:
    """Returns Llama's key map extended with the router and the experts.

    In an expert, w1 is the gate, w3 the up and w2 the down projection.
    """
    ours, theirs = "layers.{i}.feed_forward.", "model.layers.{i}.block_sparse_moe."
    names = (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    pairs = [
        (f"{ours}experts.{{e}}.{a}_proj.weight", f"{theirs}experts.{{e}}.{b}.weight")
        for a, b in names
    ]
    return llama_keymap(config, pairs=[*pairs, (f"{ours}router.weight", f"{theirs}gate.weight")])


SIZES = {
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
}

FAMILY = Family(
    name="mixtral",
    model_types=("mixtral",),
    read_config=read_config,
    write_config=write_config,
    keymap=keymap,
    sizes=SIZES,
    gguf_family="llama",
    write_gguf=write_mixtral,
)
