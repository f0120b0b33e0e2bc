"""Qwen2-MoE (with a gated shared expert) and Qwen3-MoE (QK norm, no shared expert)."""

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
    window_of_layer,
    with_defaults,
    write_model,
    write_windows,
)
from easyllm.models.families.gguf_layout import (
    LLAMA_NAMES,
    QK_NORMS,
    GGUFLayout,
    GGUFMetadata,
    read_llama,
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

_SHARED = {
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "router_aux_loss_coef": 0.001,
}
_SECOND = _SHARED | {
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "max_window_layers": 28,
}
_THIRD = _SHARED | {
    "num_key_value_heads": 4,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
"""`_SECOND`, `_THIRD`: defaults of `Qwen2MoeConfig`, `Qwen3MoeConfig` that differ from Llama's."""


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts a `Qwen2MoeConfig` or `Qwen3MoeConfig` to a `ModelConfig`."""
    third = hf.get("model_type") == "qwen3_moe"
    hf = with_defaults(hf, _THIRD if third else _SECOND)
    refuse(hf, {"hidden_act": "silu"})
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
        load_balancing=require(hf, "router_aux_loss_coef"),
    )
    step, dense = hf.get("decoder_sparse_step", 1), set(hf.get("mlp_only_layers") or ())

    def layer(number: int) -> tuple[Mixer, FeedForward]:
        mixer = read_attention(
            hf,
            qkv_bias=bias,
            out_bias=bias and third,
            qk_norm=RMSNormConfig(eps=eps) if third else None,
            window=_window(hf, number, third=third),
        )
        sparse = number not in dense and (number + 1) % step == 0
        return mixer, experts if sparse else read_glu(hf)

    return read_model(hf, family=str(hf["model_type"]), layer=layer)


def _window(hf: HFConfig, number: int, *, third: bool) -> int | None:
    """Returns the sliding window of a layer.

    Qwen3-MoE has one window for all layers. In Qwen2-MoE, the layers listed in `layer_types` have a
    window or, without that list, every second layer below `max_window_layers`.
    """
    windows, width = bool(hf["use_sliding_window"]), hf.get("sliding_window")
    if third:
        return width if windows else None
    slides = number % 2 == 0 and number < hf["max_window_layers"]
    return window_of_layer(hf, number, slides=windows and slides)


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a Qwen2-MoE or Qwen3-MoE model."""
    third = config.family == "qwen3_moe"
    forwards = [layer.feed_forward for layer in config.layers]
    sparse = [f for f in forwards if isinstance(f, MoEConfig)]
    experts = expect_part(next(iter(sparse), None), MoEConfig)
    mixer = expect_part(config.layers[0].mixer, AttentionConfig)
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
    if third:  # Qwen3-MoE has the same window in every layer
        del written["layer_types"]
    architecture = "Qwen3MoeForCausalLM" if third else "Qwen2MoeForCausalLM"
    return write_model(config, model_type=config.family, architecture=architecture) | written


def keymap(config: ModelConfig) -> KeyMap:
    """Returns Llama's key map extended with the router and the numbered experts."""
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


def read_gguf(metadata: GGUFMetadata) -> JsonObject:
    """Converts GGUF metadata of the architectures `qwen2moe` and `qwen3moe`.

    `qwen3moe` normalises the routing weights of the selected experts to sum to 1; `qwen2moe` does
    not.
    """
    third = metadata.architecture == "qwen3moe"
    metadata.expect("expert_gating_func", 1)  # softmax
    hf = read_llama(metadata, "qwen3_moe" if third else "qwen2_moe") | {
        "num_experts": metadata.need("expert_count"),
        "num_experts_per_tok": metadata.need("expert_used_count"),
        "moe_intermediate_size": metadata.need("expert_feed_forward_length"),
        "norm_topk_prob": third,
    }
    if not third:
        shared = metadata.need("expert_shared_feed_forward_length")
        hf["shared_expert_intermediate_size"] = shared
    return hf


_MLP = "model.layers.{i}.mlp."
_EXPERTS = {"blk.{i}.ffn_gate_inp": f"{_MLP}gate"}
_EXPERTS |= {
    f"blk.{{i}}.ffn_{p}_exps": f"{_MLP}experts.{{e}}.{p}_proj" for p in ("gate", "up", "down")
}
_SHARED_EXPERT = {"blk.{i}.ffn_gate_inp_shexp": f"{_MLP}shared_expert_gate"}
_SHARED_EXPERT |= {
    f"blk.{{i}}.ffn_{p}_shexp": f"{_MLP}shared_expert.{p}_proj" for p in ("gate", "up", "down")
}
QWEN2_MOE, QWEN3_MOE = (
    Family(
        name=name,
        model_types=(name,),
        read_config=read_config,
        write_config=write_config,
        keymap=keymap,
        gguf=GGUFLayout(
            architectures=(name.replace("_", ""),),
            read_config=read_gguf,
            names={**LLAMA_NAMES, **_EXPERTS, **more},
            # some files store it as a vector
            transforms={"blk.{i}.ffn_gate_inp_shexp": lambda tensor, _: tensor.reshape(1, -1)},
        ),
    )
    for name, more in (("qwen2_moe", _SHARED_EXPERT), ("qwen3_moe", QK_NORMS))
)
