"""InternLM2: Llama under other names, with queries, keys and values of a group in one tensor.

The rows of `wqkv` are those of one key-value head after another: its query heads, its key, its
value.
"""

from easyllm.checkpoint.keymap import Fused, KeyMap, renames
from easyllm.core.json_types import JsonObject
from easyllm.models.families.family import (
    Family,
    HFConfig,
    dense_layer,
    llama_keymap,
    read_attention,
    read_glu,
    read_model,
    refuse,
    with_defaults,
    write_dense_model,
)
from easyllm.models.families.gguf_layout import LLAMA_NAMES, GGUFLayout, half_split, read_llama
from easyllm.models.families.gguf_write import interleave, write_llama
from easyllm.nn.config import ModelConfig

_DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts an `InternLM2Config` to a `ModelConfig`."""
    hf = with_defaults(hf, _DEFAULTS)
    refuse(hf, {"hidden_act": "silu", "bias": False})
    mixer = read_attention(hf)
    return read_model(hf, family="internlm2", layer=lambda _: (mixer, read_glu(hf)))


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of an InternLM2 model."""
    written = write_dense_model(config, model_type="internlm2", architecture="InternLM2ForCausalLM")
    return written | {"bias": False}


_NAMES = {
    "mixer.o_proj": "attention.wo",
    "feed_forward.gate_proj": "feed_forward.w1",
    "feed_forward.down_proj": "feed_forward.w2",
    "feed_forward.up_proj": "feed_forward.w3",
    "mixer_norm": "attention_norm",
    "feed_forward_norm": "ffn_norm",
}


def keymap(config: ModelConfig) -> KeyMap:
    """Returns the key map."""
    mixer, _ = dense_layer(config)
    group = mixer.num_heads // mixer.num_kv_heads * mixer.head_dim
    qkv = tuple(f"layers.{{i}}.mixer.{part}_proj.weight" for part in "qkv")
    sizes = (group, mixer.head_dim, mixer.head_dim)
    fused = Fused(qkv, "model.layers.{i}.attention.wqkv.weight", sizes, groups=mixer.num_kv_heads)
    pairs = [
        (f"layers.{{i}}.{a}.weight", f"model.layers.{{i}}.{b}.weight") for a, b in _NAMES.items()
    ]
    pairs += [
        ("embed_tokens.weight", "model.tok_embeddings.weight"),
        ("norm.weight", "model.norm.weight"),
        ("lm_head.weight", "output.weight"),
    ]
    ignored = [r"model\.layers\.\d+\.attention\.rotary_emb\.inv_freq"]
    if config.tie_embeddings:
        ignored.append(r"output\.weight")
    return KeyMap([fused, *renames(pairs)], tuple(ignored))


_ROTATED = (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
FAMILY = Family(
    name="internlm2",
    model_types=("internlm2",),
    read_config=read_config,
    write_config=write_config,
    keymap=keymap,
    sizes={
        "internlm2-7b": {
            "model_type": "internlm2",
            "vocab_size": 92544,
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 32768,
        }
    },
    gguf=GGUFLayout(
        architectures=("internlm2",),
        read_config=lambda metadata: read_llama(metadata, "internlm2"),
        names=LLAMA_NAMES,
        transforms={f"blk.{{i}}.attn_{part}": half_split(heads) for part, heads in _ROTATED},
        untransforms={f"blk.{{i}}.attn_{part}": interleave(heads) for part, heads in _ROTATED},
    ),
    gguf_keymap=llama_keymap,
    write_gguf=write_llama,
)
