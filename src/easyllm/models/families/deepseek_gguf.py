"""DeepSeek-V2 and V3 in GGUF files (architecture `deepseek2`), with `kv_b_proj` in two parts."""

import math

from torch import Tensor

from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.models.families.gguf_layout import (
    LLAMA_NAMES,
    Divided,
    GGUFLayout,
    GGUFMetadata,
    read_rope,
)
from easyllm.models.families.gguf_write import write_scaling

SOFTMAX, SIGMOID = 1, 2
ONE_QUERY_PROJECTION = (26, 27)
"""Numbers of layers of models whose queries llama.cpp expects to have one projection."""
_LAYER, _MLP = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
BIAS = f"{_MLP}e_score_correction"  # without its last part, `bias`


def read_gguf(metadata: GGUFMetadata) -> JsonObject:
    """Converts GGUF metadata of the architecture `deepseek2`."""
    rank = metadata.need("attention.kv_lora_rank")
    rope = metadata.need("rope.dimension_count")
    width, value = metadata.need("attention.key_length"), metadata.need("attention.value_length")
    metadata.get("attention.head_count_kv")
    if metadata.get("attention.key_length_mla") is not None:
        metadata.expect("attention.key_length", rank + rope)
        metadata.expect("attention.value_length", rank)
        width = metadata.need("attention.key_length_mla")
        value = metadata.need("attention.value_length_mla")
    metadata.expect("nextn_predict_layers", 0)
    gating = metadata.get("expert_gating_func") or SOFTMAX
    metadata.expect("expert_gating_func", SOFTMAX, SIGMOID, 0)
    third, heads = gating == SIGMOID, metadata.need("attention.head_count")
    groups = metadata.get("expert_group_count") or 1
    found: JsonObject = {
        "model_type": "deepseek_v3" if third else "deepseek_v2",
        "hidden_size": metadata.need("embedding_length"),
        "intermediate_size": metadata.need("feed_forward_length"),
        "moe_intermediate_size": metadata.need("expert_feed_forward_length"),
        "num_hidden_layers": metadata.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": metadata.get("attention.q_lora_rank") or None,
        "kv_lora_rank": rank,
        "qk_nope_head_dim": width - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "max_position_embeddings": metadata.need("context_length"),
        "rms_norm_eps": metadata.need("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in metadata.tensors,
        "first_k_dense_replace": metadata.get("leading_dense_block_count", 0),
        "n_routed_experts": metadata.need("expert_count"),
        "n_shared_experts": metadata.get("expert_shared_count", 0),
        "num_experts_per_tok": metadata.need("expert_used_count"),
        "routed_scaling_factor": metadata.get("expert_weights_scale") or 1.0,
        "norm_topk_prob": bool(metadata.get("expert_weights_norm", False)),
        "n_group": groups,
        "topk_group": metadata.get("expert_group_used_count") or 1,
        **_read_rope(metadata, rope),
    }
    if not third:
        found["topk_method"] = "greedy" if groups == 1 else "group_limited_greedy"
    return found


def _read_rope(metadata: GGUFMetadata, width: int) -> JsonObject:
    """Returns the RoPE keys; cos and sin have no factor here."""
    weight, found = metadata.get("rope.scaling.yarn_log_multiplier", 0), read_rope(metadata, width)
    scaling = found["rope_scaling"]
    metadata.expect("rope.scaling.attn_factor", 1.0, 0.0)
    if scaling is not None and scaling["rope_type"] == "yarn":
        scaling |= {"attention_factor": 1.0, "mscale_all_dim": round(10 * weight, 6)}
    return found


def write_gguf(hf: JsonMapping) -> JsonObject:
    """Returns GGUF metadata.

    Raises:
        CheckpointError: llama.cpp computes something else for the model.
    """
    third, rank, rope = (
        hf["model_type"] == "deepseek_v3",
        hf["kv_lora_rank"],
        hf["qk_rope_head_dim"],
    )
    _check(hf, third=third)
    written: JsonObject = {
        "vocab_size": hf["vocab_size"],
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "block_count": hf["num_hidden_layers"],
        "feed_forward_length": hf["intermediate_size"],
        "leading_dense_block_count": hf["first_k_dense_replace"],
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": hf["qk_nope_head_dim"] + rope,
        "attention.value_length_mla": hf["v_head_dim"],
        "attention.layer_norm_rms_epsilon": float(hf["rms_norm_eps"]),
        "expert_feed_forward_length": hf["moe_intermediate_size"],
        "expert_count": hf["n_routed_experts"],
        "expert_used_count": hf["num_experts_per_tok"],
        "expert_shared_count": hf["n_shared_experts"],
        "expert_weights_scale": float(hf["routed_scaling_factor"]),
        "expert_weights_norm": bool(hf["norm_topk_prob"]),
        "expert_gating_func": SIGMOID if third else SOFTMAX,
        "rope.dimension_count": rope,
        "rope.freq_base": float(hf["rope_theta"]),
    }
    if hf["q_lora_rank"]:
        written["attention.q_lora_rank"] = hf["q_lora_rank"]
    if third and hf["n_group"] > 1:
        written["expert_group_count"] = hf["n_group"]
        written["expert_group_used_count"] = hf["topk_group"]
    scaling = dict(hf.get("rope_scaling") or {})
    if scaling.pop("attention_factor", None) is not None:
        written["rope.scaling.yarn_log_multiplier"] = 0.1 * (scaling.get("mscale_all_dim") or 0.0)
    return written | write_scaling(scaling)


def _check(hf: JsonMapping, *, third: bool) -> None:
    """Checks that llama.cpp computes what the model does."""
    scaling, reason = hf.get("rope_scaling") or {}, ""
    if not third and (hf["n_group"] or 1) > 1:
        reason = "selects groups of experts by their best one, and llama.cpp by their best two"
    elif not hf["n_shared_experts"]:
        reason = "has no shared expert, and llama.cpp expects one"
    elif not hf["q_lora_rank"] and hf["num_hidden_layers"] not in ONE_QUERY_PROJECTION:
        reason = "has one projection of queries, which llama.cpp expects of 26 or 27 layers alone"
    elif third and hf["n_group"] > 1 and hf["n_routed_experts"] == 2 * hf["n_group"]:
        reason = "has groups of 2 experts, of which llama.cpp selects others"
    elif third and not hf["rope_interleave"]:
        reason = "rotates the two halves of a vector, and llama.cpp adjacent pairs"
    elif hf["attention_bias"]:
        reason = "has biases of attention, which llama.cpp does not read"
    elif scaling.get("rope_type") == "yarn" and not math.isclose(
        scaling.get("attention_factor", 0.0), 1.0, rel_tol=1e-6
    ):
        reason = "scales cos and sin of YaRN, and llama.cpp the scores alone"
    if reason:
        raise CheckpointError(
            f"GGUF files cannot represent this model: it {reason}; save it as a Hugging Face folder"
        )


def _stored_keys(tensor: Tensor, config: JsonMapping) -> Tensor:
    """Converts [H · nope, kv_rank] to the file's [H, kv_rank, nope]."""
    return _stored_values(tensor, config).transpose(1, 2)


def _stored_values(tensor: Tensor, config: JsonMapping) -> Tensor:
    """Converts [H · value, kv_rank] to the file's [H, value, kv_rank]."""
    return tensor.view(config["num_attention_heads"], -1, tensor.shape[-1])


_NAMES = {
    **{k: v for k, v in LLAMA_NAMES.items() if k not in ("blk.{i}.attn_k", "blk.{i}.attn_v")},
    "blk.{i}.attn_q_a": f"{_LAYER}q_a_proj",
    "blk.{i}.attn_q_a_norm": f"{_LAYER}q_a_layernorm",
    "blk.{i}.attn_q_b": f"{_LAYER}q_b_proj",
    "blk.{i}.attn_kv_a_mqa": f"{_LAYER}kv_a_proj_with_mqa",
    "blk.{i}.attn_kv_a_norm": f"{_LAYER}kv_a_layernorm",
    "blk.{i}.attn_kv_b": f"{_LAYER}kv_b_proj",
    "blk.{i}.attn_k_b": f"{_LAYER}k_b_proj",
    "blk.{i}.attn_v_b": f"{_LAYER}v_b_proj",
    "blk.{i}.ffn_gate_inp": f"{_MLP}gate",
    "blk.{i}.exp_probs_b": BIAS,
}
for _part in ("gate", "up", "down"):
    _NAMES[f"blk.{{i}}.ffn_{_part}_exps"] = f"{_MLP}experts.{{e}}.{_part}_proj"
    _NAMES[f"blk.{{i}}.ffn_{_part}_shexp"] = f"{_MLP}shared_experts.{_part}_proj"

LAYOUT = GGUFLayout(
    architectures=("deepseek2",),
    read_config=read_gguf,
    names=_NAMES,
    transforms={
        "blk.{i}.attn_k_b": lambda tensor, _: tensor.transpose(1, 2).flatten(0, 1),
        "blk.{i}.attn_v_b": lambda tensor, _: tensor.flatten(0, 1),
    },
    untransforms={"blk.{i}.attn_k_b": _stored_keys, "blk.{i}.attn_v_b": _stored_values},
    divided={
        f"{_LAYER}kv_b_proj": Divided(
            parts={f"{_LAYER}k_b_proj": "qk_nope_head_dim", f"{_LAYER}v_b_proj": "v_head_dim"},
            groups="num_attention_heads",
        )
    },
)
__all__ = ["BIAS", "LAYOUT", "write_gguf"]
