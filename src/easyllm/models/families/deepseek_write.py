"""The `config.json` of DeepSeek-V2 and V3 from a `ModelConfig`."""

import math

from easyllm.core.json_types import JsonObject
from easyllm.models.families.family import expect_part, write_token_ids
from easyllm.models.families.rope_config import write_max_seq_len, write_rope
from easyllm.nn.config import GLUConfig, LatentAttentionConfig, ModelConfig, MoEConfig
from easyllm.nn.position_config import YarnScaling


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a DeepSeek-V2 or V3 model."""
    third = config.family == "deepseek_v3"
    mixer = expect_part(config.layers[0].mixer, LatentAttentionConfig)
    forwards = [layer.feed_forward for layer in config.layers]
    experts = expect_part(next((f for f in forwards if isinstance(f, MoEConfig)), None), MoEConfig)
    dense = [f for f in forwards if isinstance(f, GLUConfig)]
    inner = experts.expert.intermediate_size
    shared = 0 if experts.shared is None else experts.shared.intermediate_size / inner
    written: JsonObject = {
        "architectures": [f"Deepseek{'V3' if third else 'V2'}ForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": dense[0].intermediate_size if dense else inner,
        "moe_intermediate_size": inner,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_heads,
        "q_lora_rank": mixer.q_rank,
        "kv_lora_rank": mixer.kv_rank,
        "qk_nope_head_dim": mixer.nope_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.value_dim,
        "attention_bias": mixer.bias,
        "max_position_embeddings": write_max_seq_len(config.max_seq_len, mixer.position),
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "first_k_dense_replace": len(dense),
        "n_routed_experts": experts.num_experts,
        "n_shared_experts": round(shared),
        "num_experts_per_tok": experts.experts_per_token,
        "routed_scaling_factor": experts.scale,
        "aux_loss_alpha": _times(experts.load_balancing, experts.experts_per_token),
        **_write_rope(mixer),
        **write_token_ids(config),
    }
    grouped = third or experts.num_groups > 1
    written["n_group"] = experts.num_groups if grouped else None
    written["topk_group"] = experts.groups_per_token if grouped else None
    if third:
        return written | {
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": experts.normalise,
            "rope_interleave": mixer.position.interleaved,
            "num_nextn_predict_layers": 0,
        }
    return written | {
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": experts.normalise,
    }


def _write_rope(mixer: LatentAttentionConfig) -> JsonObject:
    """Returns the RoPE keys; `mscale` repeats the factor on cos and sin for tools that need it."""
    written = write_rope(mixer.position, mixer.rope_dim)
    scaling = mixer.position.scaling
    if mixer.mscale and isinstance(scaling, YarnScaling):
        step = 0.1 * math.log(scaling.factor)
        factor = scaling.attention_factor or 1.0 + step
        own = (factor * (1 + step * mixer.mscale) - 1) / step if step > 0 else mixer.mscale
        written["rope_scaling"] |= {"mscale_all_dim": mixer.mscale, "mscale": round(own, 9)}
    return written


def _times(part: float, count: int) -> float:
    """Returns the number that divided by `count` gives `part`, the shortest there is."""
    return next((n for n in (float(f"{part * count:.12g}"),) if n / count == part), part * count)


__all__ = ["write_config"]
