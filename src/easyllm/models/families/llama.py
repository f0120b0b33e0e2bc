"""Llama 1/2 and models of the same make: SmolLM2, TinyLlama."""

from typing import Any

from easyllm.checkpoint.keymap import KeyMap, renames
from easyllm.models.families.family import (
    Family,
    HFConfig,
    num_layers,
    refuse,
    require,
    rope_theta,
    token_ids,
    write_token_ids,
)
from easyllm.nn.config import (
    AttentionConfig,
    GLUConfig,
    LayerConfig,
    ModelConfig,
    RMSNormConfig,
    Rope,
)


def read_config(hf: HFConfig) -> ModelConfig:
    """A `LlamaConfig` as `ModelConfig`."""
    refuse(hf, {"hidden_act": "silu", "pretraining_tp": 1})
    heads = require(hf, "num_attention_heads")
    layer = LayerConfig(
        mixer=AttentionConfig(
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or require(hf, "hidden_size") // heads,
            position=Rope(theta=rope_theta(hf)),
            qkv_bias=bool(hf.get("attention_bias", False)),
            out_bias=bool(hf.get("attention_bias", False)),
        ),
        feed_forward=GLUConfig(
            intermediate_size=require(hf, "intermediate_size"), bias=bool(hf.get("mlp_bias", False))
        ),
    )
    return ModelConfig(
        family="llama",
        vocab_size=require(hf, "vocab_size"),
        hidden_size=require(hf, "hidden_size"),
        max_seq_len=hf.get("max_position_embeddings", 2048),
        layers=(layer,) * num_layers(hf),
        norm=RMSNormConfig(eps=hf.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        **token_ids(hf),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model, in the spelling of transformers 4 (which 5 reads as well)."""
    layer = config.layers[0]
    mixer, position = layer.mixer, layer.mixer.position
    assert isinstance(position, Rope)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": layer.feed_forward.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm.eps,
        "rope_theta": position.theta,
        "attention_bias": mixer.qkv_bias,
        "mlp_bias": layer.feed_forward.bias,
        "tie_word_embeddings": config.tie_embeddings,
        **write_token_ids(config),
    }


def keymap(config: ModelConfig) -> KeyMap:
    """Names on disk; q, k, v and gate, up stay apart as in HF."""
    layer = "layers.{i}."
    pairs = [
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        (layer + "mixer_norm.weight", f"model.{layer}input_layernorm.weight"),
        (layer + "feed_forward_norm.weight", f"model.{layer}post_attention_layernorm.weight"),
    ]
    for kind in ("weight", "bias"):
        pairs += [
            (f"{layer}mixer.{p}_proj.{kind}", f"model.{layer}self_attn.{p}_proj.{kind}")
            for p in "qkvo"
        ]
        pairs += [
            (f"{layer}feed_forward.{p}_proj.{kind}", f"model.{layer}mlp.{p}_proj.{kind}")
            for p in ("gate", "up", "down")
        ]
    ignored = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
    if config.tie_embeddings:
        ignored.append(r"lm_head\.weight")
    return KeyMap(renames(pairs), tuple(ignored))


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    read_config=read_config,
    write_config=write_config,
    keymap=keymap,
)
