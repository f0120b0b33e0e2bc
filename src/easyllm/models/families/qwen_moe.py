"""Qwen2-MoE (a shared expert behind a gate) and Qwen3-MoE (normalised queries and keys, no shared expert)."""

from typing import Any

from easyllm.checkpoint.keymap import KeyMap
from easyllm.models.families.family import (
    Family,
    HFConfig,
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
from easyllm.nn.config import (
    AttentionConfig,
    FeedForward,
    GLUConfig,
    Mixer,
    ModelConfig,
    MoEConfig,
    RMSNormConfig,
)


def read_config(hf: HFConfig) -> ModelConfig:
    """A `Qwen2MoeConfig` or `Qwen3MoeConfig` as `ModelConfig`."""
    refuse(hf, {"hidden_act": "silu"})
    third = hf.get("model_type") == "qwen3_moe"
    bias = bool(hf.get("attention_bias" if third else "qkv_bias", not third))
    eps = hf.get("rms_norm_eps", 1e-6)
    shared = 0 if third else require(hf, "shared_expert_intermediate_size")
    experts = MoEConfig(
        num_experts=hf.get("num_experts") or require(hf, "num_local_experts"),
        experts_per_token=require(hf, "num_experts_per_tok"),
        expert=GLUConfig(intermediate_size=require(hf, "moe_intermediate_size")),
        routing="softmax_topk",
        normalise=bool(hf.get("norm_topk_prob", False)),
        shared=GLUConfig(intermediate_size=shared) if shared else None,
        shared_gate=bool(shared),
        load_balancing=hf.get("router_aux_loss_coef", 0.001),
    )
    step, dense = hf.get("decoder_sparse_step", 1), set(hf.get("mlp_only_layers") or ())

    def layer(number: int) -> tuple[Mixer, FeedForward]:
        mixer = read_attention(
            hf,
            qkv_bias=bias,
            out_bias=bias and third,
            qk_norm=RMSNormConfig(eps=eps) if third else None,
            window=window_of_layer(hf, number),
        )
        sparse = number not in dense and (number + 1) % step == 0
        return mixer, experts if sparse else read_glu(hf)

    return read_model(hf, family=str(hf["model_type"]), layer=layer)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Its `config.json`."""
    third = config.family == "qwen3_moe"
    forwards = [layer.feed_forward for layer in config.layers]
    experts = next(f for f in forwards if isinstance(f, MoEConfig))
    mixer = config.layers[0].mixer
    assert isinstance(mixer, AttentionConfig)
    dense = [i for i, f in enumerate(forwards) if isinstance(f, GLUConfig)]
    width = next((f.intermediate_size for f in forwards if isinstance(f, GLUConfig)), 4)
    written = {
        "intermediate_size": width,
        "hidden_act": "silu",
        "moe_intermediate_size": experts.expert.intermediate_size,
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "norm_topk_prob": experts.normalise,
        "router_aux_loss_coef": experts.load_balancing,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "attention_bias" if third else "qkv_bias": mixer.qkv_bias,
        **write_windows(config),
    }
    if experts.shared is not None:
        written["shared_expert_intermediate_size"] = experts.shared.intermediate_size
    architecture = "Qwen3MoeForCausalLM" if third else "Qwen2MoeForCausalLM"
    return write_model(config, model_type=config.family, architecture=architecture) | written


def keymap(config: ModelConfig) -> KeyMap:
    """Names on disk: Llama's with experts by number."""
    ours, theirs = "layers.{i}.feed_forward.", "model.layers.{i}.mlp."
    pairs = [
        (f"{ours}router.weight", f"{theirs}gate.weight"),
        (f"{ours}shared_gate.weight", f"{theirs}shared_expert_gate.weight"),
    ]
    for p in ("gate", "up", "down"):
        pairs += [
            (f"{ours}experts.{{e}}.{p}_proj.weight", f"{theirs}experts.{{e}}.{p}_proj.weight"),
            (f"{ours}shared.{p}_proj.weight", f"{theirs}shared_expert.{p}_proj.weight"),
        ]
    return llama_keymap(config, pairs=pairs)


FAMILIES = tuple(
    Family(
        name=name,
        model_types=(name,),
        read_config=read_config,
        write_config=write_config,
        keymap=keymap,
    )
    for name in ("qwen2_moe", "qwen3_moe")
)
