"""ChatGLM2, ChatGLM3 and GLM-4-9B in GGUF files (architecture `chatglm`)."""

from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.models.families.gguf_layout import GGUFLayout, GGUFMetadata, read_rope

THETA = 10000.0
RATIO_KIND = "rope_ratio_scales"
"""Key that tells what `rope_ratio` scales: `positions` (ChatGLM2) or `base` (later models)."""
NAMES = {
    "embed_tokens": "transformer.embedding.word_embeddings",
    "norm": "transformer.encoder.final_layernorm",
    "lm_head": "transformer.output_layer",
}
"""Tensors outside the layers: our names and those of the authors' files."""


def read_gguf(metadata: GGUFMetadata) -> JsonObject:
    """Converts GGUF metadata of the architecture `chatglm`."""
    heads, hidden = metadata.need("attention.head_count"), metadata.need("embedding_length")
    width = metadata.get("attention.key_length", hidden // heads)
    metadata.expect("attention.value_length", width)
    metadata.expect("rope.dimension_count", width // 2)
    rope = read_rope(metadata, width // 2)
    scaling = rope["rope_scaling"]
    ratio: JsonObject = {"rope_ratio": rope["rope_theta"] / THETA, RATIO_KIND: "base"}
    if scaling is not None:
        if scaling["rope_type"] != "linear" or rope["rope_theta"] != THETA:
            raise metadata.refusal("rope.scaling.type", "none, or linear with a base of 10000")
        ratio = {"rope_ratio": scaling["factor"], RATIO_KIND: "positions"}
    return ratio | {
        "model_type": "chatglm",
        "hidden_size": hidden,
        "ffn_hidden_size": metadata.need("feed_forward_length"),
        "num_layers": metadata.need("block_count"),
        "num_attention_heads": heads,
        "kv_channels": width,
        "multi_query_attention": True,
        "multi_query_group_num": metadata.get("attention.head_count_kv", heads),
        "add_qkv_bias": "blk.0.attn_qkv.bias" in metadata.tensors,
        "layernorm_epsilon": metadata.need("attention.layer_norm_rms_epsilon"),
        "seq_length": metadata.need("context_length"),
        "tie_word_embeddings": "output.weight" not in metadata.tensors,
    }


def write_gguf(hf: JsonMapping) -> JsonObject:
    """Returns GGUF metadata."""
    positions = hf.get(RATIO_KIND) == "positions"
    ratio = float(hf["rope_ratio"])
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": ratio} if positions else {}
    return {
        "vocab_size": hf["padded_vocab_size"],
        "context_length": hf["seq_length"],
        "embedding_length": hf["hidden_size"],
        "block_count": hf["num_layers"],
        "feed_forward_length": hf["ffn_hidden_size"],
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["multi_query_group_num"],
        "attention.key_length": hf["kv_channels"],
        "attention.value_length": hf["kv_channels"],
        "attention.layer_norm_rms_epsilon": float(hf["layernorm_epsilon"]),
        "rope.dimension_count": hf["kv_channels"] // 2,
        "rope.freq_base": THETA if positions else THETA * ratio,
        **scaling,
    }


_LAYER = "transformer.encoder.layers.{i}."
GGUF = GGUFLayout(
    architectures=("chatglm",),
    read_config=read_gguf,
    names={
        "token_embd": NAMES["embed_tokens"],
        "output_norm": NAMES["norm"],
        "output": NAMES["lm_head"],
        "blk.{i}.attn_norm": f"{_LAYER}input_layernorm",
        "blk.{i}.attn_qkv": f"{_LAYER}self_attention.query_key_value",
        "blk.{i}.attn_output": f"{_LAYER}self_attention.dense",
        "blk.{i}.ffn_norm": f"{_LAYER}post_attention_layernorm",
        "blk.{i}.ffn_up": f"{_LAYER}mlp.dense_h_to_4h",
        "blk.{i}.ffn_down": f"{_LAYER}mlp.dense_4h_to_h",
    },
)
