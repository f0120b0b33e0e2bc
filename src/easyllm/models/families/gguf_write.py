"""Metadata and tensors of GGUF files, from `config.json` values: the inverse of `gguf_layout`.

Keys are those of the GGUF specification, without the architecture in front. Sizes are written as
u32, fractions as f32, as llama.cpp's converter writes them.
"""

from torch import Tensor

from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.models.families.gguf_layout import Transform
from easyllm.nn.position_config import Llama3Scaling
from easyllm.nn.rope_scaling import frequencies, llama3_frequencies


def write_llama(hf: JsonMapping) -> JsonObject:
    """Returns the metadata that Llama-style models share.

    Raises:
        CheckpointError: the positions cannot be represented.
    """
    heads = hf["num_attention_heads"]
    width = hf.get("head_dim") or hf["hidden_size"] // heads
    return {
        "vocab_size": hf["vocab_size"],
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "block_count": hf["num_hidden_layers"],
        "feed_forward_length": hf["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(hf["rms_norm_eps"]),
        "rope.dimension_count": width,
        "rope.freq_base": float(hf["rope_theta"]),
        **write_scaling(hf.get("rope_scaling") or {}),
    }


def write_scaling(scaling: JsonMapping) -> JsonObject:
    """Returns the metadata of a RoPE scaling; that of Llama 3 is a tensor (`rope_factors`)."""
    kind = scaling.get("rope_type")
    if kind in (None, "default", "llama3"):
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn" and "attention_factor" not in scaling:
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling["factor"]),
            "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": float(scaling.get("beta_fast", 32)),
            "rope.scaling.yarn_beta_slow": float(scaling.get("beta_slow", 1)),
        }
    raise CheckpointError(
        f"GGUF files cannot represent the RoPE scaling {kind!r} of this model; save it as a "
        "Hugging Face folder"
    )


def rope_factors(hf: JsonMapping) -> Tensor | None:
    """Returns the tensor `rope_freqs.weight` [head_dim / 2] of a model; None if it has none."""
    scaling = hf.get("rope_scaling") or {}
    if scaling.get("rope_type") != "llama3":
        return None
    width = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    theta = float(hf["rope_theta"])
    rule = Llama3Scaling(
        factor=scaling["factor"],
        low_freq_factor=scaling["low_freq_factor"],
        high_freq_factor=scaling["high_freq_factor"],
        original_max_seq_len=scaling["original_max_position_embeddings"],
    )
    return frequencies(theta, width) / llama3_frequencies(theta, width, rule)


def write_mistral(hf: JsonMapping) -> JsonObject:
    """Returns the metadata of Llama and Mistral models, which share an architecture."""
    window = hf.get("sliding_window")
    return write_llama(hf) | ({"attention.sliding_window": window} if window else {})


def write_mixtral(hf: JsonMapping) -> JsonObject:
    """Returns the metadata of a Mixtral model."""
    return write_mistral(hf) | {
        "expert_count": hf["num_local_experts"],
        "expert_used_count": hf["num_experts_per_tok"],
    }


def interleave_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Permutes the rows of a query or key projection for llama.cpp's RoPE.

    The inverse of `gguf_layout.half_split_rows`.
    """
    halves = weight.view(num_heads, 2, -1, *weight.shape[1:])  # [heads, 2, d/2, ...]
    return halves.transpose(1, 2).reshape(weight.shape)


def interleave(heads: str) -> Transform:
    """Returns `interleave_rows` as a transform; the head count is the `config.json` key `heads`."""
    return lambda tensor, config: interleave_rows(tensor, config[heads])


__all__ = [
    "interleave",
    "interleave_rows",
    "rope_factors",
    "write_llama",
    "write_mistral",
    "write_mixtral",
    "write_scaling",
]
