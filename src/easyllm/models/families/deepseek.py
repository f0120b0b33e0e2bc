"""DeepSeek-V2 and V3 (and R1): latent attention, shared experts, experts in groups.

V2 selects experts by a softmax, V3 by sigmoids with a bias for each expert that balances the load.
Layers beyond the last (the multi-token prediction of V3) are not loaded.
"""

from easyllm.checkpoint.keymap import KeyMap, Rename, renames
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonObject
from easyllm.models.families.deepseek_gguf import BIAS, LAYOUT, write_gguf
from easyllm.models.families.deepseek_sizes import SECOND, THIRD, V2_LITE, V3
from easyllm.models.families.deepseek_write import write_config
from easyllm.models.families.family import (
    Family,
    HFConfig,
    llama_pairs,
    read_glu,
    read_model,
    refuse,
    require,
    with_defaults,
)
from easyllm.models.families.rope_config import read_rope
from easyllm.nn.config import (
    FeedForward,
    GLUConfig,
    LatentAttentionConfig,
    Mixer,
    ModelConfig,
    MoEConfig,
)
from easyllm.nn.position_config import Rope, YarnScaling


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts a `DeepseekV2Config` or `DeepseekV3Config` to a `ModelConfig`."""
    third = hf.get("model_type") == "deepseek_v3"
    hf = with_defaults(hf, THIRD if third else SECOND)
    heads = require(hf, "num_attention_heads")
    refuse(hf, {"hidden_act": "silu", "moe_layer_freq": 1, "mlp_bias": False})
    interleaved = bool(hf.get("rope_interleave", True))
    position = read_rope(hf, require(hf, "qk_rope_head_dim"), interleaved=interleaved)
    mixer = LatentAttentionConfig(
        num_heads=heads,
        q_rank=hf.get("q_lora_rank"),
        kv_rank=require(hf, "kv_lora_rank"),
        nope_dim=require(hf, "qk_nope_head_dim"),
        rope_dim=require(hf, "qk_rope_head_dim"),
        value_dim=require(hf, "v_head_dim"),
        position=position,
        bias=bool(hf.get("attention_bias", False)),
        mscale=_mscale(hf, position),
    )
    experts = _experts(hf, third=third)
    dense = hf.get("first_k_dense_replace") or 0

    def layer(number: int) -> tuple[Mixer, FeedForward]:
        return mixer, read_glu(hf) if number < dense else experts

    return read_model(hf, family=str(hf["model_type"]), layer=layer)


def _mscale(hf: HFConfig, position: Rope) -> float:
    """Returns `mscale_all_dim` of the RoPE scaling, by which scores are scaled."""
    values = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    weight = float(values.get("mscale_all_dim") or 0.0)
    if weight and not isinstance(position.scaling, YarnScaling):
        raise CheckpointError(
            f"config.json sets mscale_all_dim={weight!r} without YaRN scaling, which is not "
            "implemented; copy the checkpoint's own config.json"
        )
    return weight


def _experts(hf: HFConfig, *, third: bool) -> MoEConfig:
    inner, per_token = require(hf, "moe_intermediate_size"), require(hf, "num_experts_per_tok")
    shared = hf.get("n_shared_experts") or 0
    return MoEConfig(
        num_experts=hf.get("num_local_experts") or require(hf, "n_routed_experts"),
        experts_per_token=per_token,
        expert=GLUConfig(intermediate_size=inner),
        shared=GLUConfig(intermediate_size=inner * shared) if shared else None,
        scale=hf.get("routed_scaling_factor") or 1.0,
        # theirs is of shares that sum to 1, ours of shares that sum to the experts of a token
        load_balancing=(hf.get("aux_loss_alpha") or 0.0) / per_token,
        **(_third_routing(hf) if third else _second_routing(hf)),
    )


def _second_routing(hf: HFConfig) -> JsonObject:
    refuse(hf, {"norm_topk_prob": False, "scoring_func": "softmax"})
    method, routing = hf.get("topk_method"), {"routing": "softmax_topk", "normalise": False}
    if method == "greedy":
        return routing
    if method != "group_limited_greedy":
        raise CheckpointError(
            f"config.json sets topk_method={method!r}, which is not implemented (expected 'greedy' "
            "or 'group_limited_greedy')"
        )
    return routing | _groups(hf)


def _third_routing(hf: HFConfig) -> JsonObject:
    refuse(hf, {"topk_method": "noaux_tc", "scoring_func": "sigmoid"})
    return _groups(hf) | {
        "routing": "sigmoid_topk",
        "selection_bias": True,
        "normalise": bool(require(hf, "norm_topk_prob")),
        "group_score": "best_two",
    }


def _groups(hf: HFConfig) -> JsonObject:
    return {"num_groups": require(hf, "n_group"), "groups_per_token": require(hf, "topk_group")}


def keymap(config: ModelConfig) -> KeyMap:
    """Returns the key map: Llama's, with the projections of latent vectors and the experts."""
    ours, theirs = "layers.{i}.", "model.layers.{i}."
    pairs = [
        (f"{ours}mixer.{a}.{kind}", f"{theirs}self_attn.{b}.{kind}")
        for a, b in (
            ("q_a_proj", "q_a_proj"),
            ("q_a_norm", "q_a_layernorm"),
            ("q_b_proj", "q_b_proj"),
            ("kv_a_proj", "kv_a_proj_with_mqa"),
            ("kv_a_norm", "kv_a_layernorm"),
            ("kv_b_proj", "kv_b_proj"),
        )
        for kind in ("weight", "bias")
    ]
    block, mlp = f"{ours}feed_forward.", f"{theirs}mlp."
    pairs.append((f"{block}router.weight", f"{mlp}gate.weight"))
    for p in ("gate", "up", "down"):
        pairs += [
            (f"{block}experts.{{e}}.{p}_proj.weight", f"{mlp}experts.{{e}}.{p}_proj.weight"),
            (f"{block}shared.{p}_proj.weight", f"{mlp}shared_experts.{p}_proj.weight"),
        ]
    bias = Rename(f"{block}selection_bias", f"{mlp}gate.e_score_correction_bias")
    beyond = rf"model\.layers\.{config.num_layers}\..*"
    ignored = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", beyond]
    if config.tie_embeddings:
        ignored.append(r"lm_head\.weight")
    return KeyMap([bias, *renames(pairs), *renames(llama_pairs())], tuple(ignored))


def gguf_keymap(config: ModelConfig) -> KeyMap:
    """Returns the key map of GGUF files, which name the bias of the selection otherwise."""
    plain = keymap(config)
    bias = Rename("layers.{i}.feed_forward.selection_bias", f"{BIAS}.bias")
    return KeyMap([bias, *plain.rules[1:]], plain.ignored)


V2, V3_FAMILY = (
    Family(
        name=name,
        model_types=(name,),
        read_config=read_config,
        write_config=write_config,
        keymap=keymap,
        sizes=sizes,
        gguf=layout,
        gguf_keymap=gguf_keymap,
        gguf_family="deepseek_v2",
        write_gguf=write_gguf,
    )
    for name, sizes, layout in (
        ("deepseek_v2", {"deepseek-v2-lite": V2_LITE}, LAYOUT),
        ("deepseek_v3", {"deepseek-v3": V3}, None),
    )
)
