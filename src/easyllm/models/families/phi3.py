"""Phi-3: Llama with queries, keys and values in one tensor, and gate and up projections in another.

Its long-context variants have LongRoPE: factors for each pair of dims, and others for sequences
beyond the original length.
"""

from easyllm.checkpoint.keymap import Fused, KeyMap
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.models.families.family import (
    Family,
    HFConfig,
    dense_layer,
    expect_part,
    llama_keymap,
    read_attention,
    read_glu,
    read_model,
    refuse,
    require,
    with_defaults,
    write_dense_model,
)
from easyllm.models.families.gguf_layout import LLAMA_NAMES, GGUFLayout, GGUFMetadata, read_llama
from easyllm.models.families.gguf_write import write_llama
from easyllm.models.families.rope_config import read_rope
from easyllm.nn.config import ModelConfig
from easyllm.nn.position_config import LongRopeScaling, Rope

_DEFAULTS = {
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts a `Phi3Config` to a `ModelConfig`."""
    hf = with_defaults(hf, _DEFAULTS)
    refuse(hf, {"hidden_act": "silu"})
    width = hf.get("head_dim") or require(hf, "hidden_size") // require(hf, "num_attention_heads")
    mixer = read_attention(
        hf, position=read_rope(hf, width, share=1.0), window=hf.get("sliding_window")
    )
    return read_model(hf, family="phi3", layer=lambda _: (mixer, read_glu(hf)))


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a Phi-3 model."""
    mixer, _ = dense_layer(config)
    scaling = expect_part(mixer.position, Rope).scaling
    original = config.max_seq_len
    if isinstance(scaling, LongRopeScaling):
        original = scaling.original_max_seq_len
    return write_dense_model(config, model_type="phi3", architecture="Phi3ForCausalLM") | {
        "sliding_window": mixer.window,
        "original_max_position_embeddings": original,
    }


def keymap(config: ModelConfig) -> KeyMap:
    """Returns Llama's key map with two fused tensors in a layer."""
    mixer, feed_forward = dense_layer(config)
    kv, inner = mixer.num_kv_heads * mixer.head_dim, feed_forward.intermediate_size
    theirs = "model.layers.{i}."
    qkv = tuple(f"layers.{{i}}.mixer.{part}_proj.weight" for part in "qkv")
    gate_up = tuple(f"layers.{{i}}.feed_forward.{part}_proj.weight" for part in ("gate", "up"))
    sizes = (mixer.num_heads * mixer.head_dim, kv, kv)
    return llama_keymap(
        config,
        more=[
            Fused(qkv, f"{theirs}self_attn.qkv_proj.weight", sizes),
            Fused(gate_up, f"{theirs}mlp.gate_up_proj.weight", (inner, inner)),
        ],
    )


def read_gguf(metadata: GGUFMetadata) -> JsonObject:
    """Converts GGUF metadata of the architecture `phi3`.

    llama.cpp has no window for it, whatever the file says, unless it is shorter than the context.
    """
    hf = read_llama(metadata, "phi3")
    window = metadata.get("attention.sliding_window", 0)
    metadata.get("rope.scaling.original_context_length")  # of scalings that are refused
    if window and window < hf["max_position_embeddings"]:
        raise metadata.refusal("attention.sliding_window", "none, or at least the context length")
    return hf | {"sliding_window": None}


def write_gguf(hf: JsonMapping) -> JsonObject:
    """Returns GGUF metadata.

    Raises:
        CheckpointError: the model has a window that matters.
    """
    window = hf.get("sliding_window")
    if window and window < hf["max_position_embeddings"]:
        raise CheckpointError(
            f"llama.cpp has no sliding window for Phi-3, but this model has one of {window} "
            "tokens; save it as a Hugging Face folder"
        )
    length = {"rope.scaling.original_context_length": hf["max_position_embeddings"]}
    return write_llama(hf) | length


_FUSED = {
    "blk.{i}.attn_qkv": "model.layers.{i}.self_attn.qkv_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.gate_up_proj",
}
FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    read_config=read_config,
    write_config=write_config,
    keymap=keymap,
    sizes={
        "phi3-mini": {
            "model_type": "phi3",
            "vocab_size": 32064,
            "num_hidden_layers": 32,
            "hidden_size": 3072,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
        }
    },
    gguf=GGUFLayout(
        architectures=("phi3",), read_config=read_gguf, names={**LLAMA_NAMES, **_FUSED}
    ),
    write_gguf=write_gguf,
)
