"""ChatGLM2, ChatGLM3 and GLM-4-9B in the layout of their authors' code (`model_type` `chatglm`).

A causal model with grouped-query attention and SwiGLU, whose RoPE rotates adjacent pairs of the
first half of each head. Query and key rows are reordered on loading, so that the model has ordinary
half-split RoPE; files keep the authors' order.
"""

from easyllm.checkpoint.keymap import Fused, KeyMap, Rule, renames
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonObject
from easyllm.models.families.chatglm2_gguf import GGUF, NAMES, RATIO_KIND, THETA, write_gguf
from easyllm.models.families.family import (
    Family,
    HFConfig,
    dense_layer,
    expect_part,
    num_layers,
    read_token_ids,
    refuse,
    require,
    with_defaults,
    write_token_ids,
)
from easyllm.models.families.row_order import reordered_qkv, separated_pairs
from easyllm.nn.config import AttentionConfig, GLUConfig, LayerConfig, ModelConfig, RMSNormConfig
from easyllm.nn.position_config import LinearScaling, Rope

_DEFAULTS = {
    "layernorm_epsilon": 1e-5,
    "seq_length": 2048,
    "kv_channels": 128,
    "add_qkv_bias": False,
    "ffn_hidden_size": 13696,
    "rope_ratio": 1,
}


def is_second(hf: HFConfig) -> bool:
    """Whether a `config.json` of `model_type` `chatglm` is one of ChatGLM2 or later."""
    return any(key in hf for key in ("multi_query_attention", "ffn_hidden_size", "seq_length"))


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts a `config.json` of ChatGLM2, ChatGLM3 or GLM-4-9B to a `ModelConfig`."""
    name = str(hf.get("_name_or_path", "")).lower()
    hf = with_defaults(hf, _DEFAULTS)
    refuse(hf, {"multi_query_attention": True, "add_bias_linear": False, "rmsnorm": True})
    refuse(hf, {"apply_residual_connection_post_layernorm": False, "post_layer_norm": True})
    refuse(hf, {"original_rope": True, "quantization_bit": 0, "pre_seq_len": None})
    heads, width = require(hf, "num_attention_heads"), require(hf, "kv_channels")
    rope = Rope(rotary_dim=width // 2)
    if hf["rope_ratio"] not in (1, None):
        rope = rope.model_copy(update=_scaled(float(hf["rope_ratio"]), hf.get(RATIO_KIND), name))
    mixer = AttentionConfig(
        num_heads=heads,
        num_kv_heads=require(hf, "multi_query_group_num"),
        head_dim=width,
        position=rope,
        qkv_bias=bool(hf["add_qkv_bias"]),
    )
    layer = LayerConfig(
        mixer=mixer, feed_forward=GLUConfig(intermediate_size=require(hf, "ffn_hidden_size"))
    )
    unpadded = hf.get("vocab_size")
    return ModelConfig(
        family="chatglm2",
        vocab_size=hf.get("padded_vocab_size") or unpadded or require(hf, "padded_vocab_size"),
        hidden_size=require(hf, "hidden_size"),
        max_seq_len=hf["seq_length"],
        layers=(layer,) * num_layers(hf, "num_layers"),
        norm=RMSNormConfig(eps=hf["layernorm_epsilon"]),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        **read_token_ids(hf),
    )


def _scaled(ratio: float, kind: object, name: str) -> JsonObject:
    """Returns what `rope_ratio` changes: ChatGLM2 divides positions by it, later models scale θ.

    Raises:
        CheckpointError: the file does not tell which of the two its model does.
    """
    if kind is None and name:
        kind = "positions" if "chatglm2" in name else "base" if "glm" in name else None
    if kind == "positions":
        return {"scaling": LinearScaling(factor=ratio)}
    if kind == "base":
        return {"theta": THETA * ratio}
    raise CheckpointError(
        f"config.json sets rope_ratio={ratio:g}, by which ChatGLM2 divides positions and later "
        "models multiply the base of RoPE, but its _name_or_path names neither; set "
        f"{RATIO_KIND!r} to 'positions' (ChatGLM2) or 'base' (ChatGLM3, GLM-4)"
    )


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a ChatGLM2 model."""
    mixer, feed_forward = dense_layer(config)
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "padded_vocab_size": config.vocab_size,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": feed_forward.intermediate_size,
        "num_layers": config.num_layers,
        "num_attention_heads": mixer.num_heads,
        "kv_channels": mixer.head_dim,
        "multi_query_attention": True,
        "multi_query_group_num": mixer.num_kv_heads,
        "add_qkv_bias": mixer.qkv_bias,
        "add_bias_linear": False,
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "original_rope": True,
        "layernorm_epsilon": config.norm.eps,
        "seq_length": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings,
        **_written_ratio(expect_part(mixer.position, Rope)),
        **write_token_ids(config),
    }


def _written_ratio(rope: Rope) -> JsonObject:
    match rope.scaling:
        case None if rope.theta == THETA:
            return {"rope_ratio": 1}
        case None:
            return {"rope_ratio": rope.theta / THETA, RATIO_KIND: "base"}
        case LinearScaling() if rope.theta == THETA:
            return {"rope_ratio": rope.scaling.factor, RATIO_KIND: "positions"}
    raise CheckpointError("its RoPE is scaled in a way that rope_ratio cannot express")


_OF_LAYERS = {
    "mixer_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "mixer.o_proj": "self_attention.dense",
    "feed_forward.down_proj": "mlp.dense_4h_to_h",
}


def keymap(config: ModelConfig) -> KeyMap:
    """Returns the key map: fused queries, keys and values, and fused gate and up projections."""
    mixer, feed_forward = dense_layer(config)
    rotary = expect_part(mixer.position, Rope).rotary_dim or mixer.head_dim
    orders = [separated_pairs(heads, rotary) for heads in (mixer.num_heads, mixer.num_kv_heads)]
    kv_width, inner = mixer.num_kv_heads * mixer.head_dim, feed_forward.intermediate_size
    sizes = (mixer.num_heads * mixer.head_dim, kv_width, kv_width)
    theirs = "transformer.encoder.layers.{i}."
    rules: list[Rule] = []
    for kind in ("weight", "bias"):
        names = tuple(f"layers.{{i}}.mixer.{part}_proj.{kind}" for part in "qkv")
        fused = Fused(names, f"{theirs}self_attention.query_key_value.{kind}", sizes)
        rules.append(reordered_qkv(fused, *orders))
    parts = tuple(f"layers.{{i}}.feed_forward.{part}_proj.weight" for part in ("gate", "up"))
    rules.append(Fused(parts, f"{theirs}mlp.dense_h_to_4h.weight", (inner, inner)))
    rules += renames((f"{a}.weight", f"{b}.weight") for a, b in NAMES.items())
    rules += renames(
        (f"layers.{{i}}.{a}.weight", f"{theirs}{b}.weight") for a, b in _OF_LAYERS.items()
    )
    ignored = [r"transformer\.rotary_pos_emb\.inv_freq"]
    if config.tie_embeddings:
        ignored.append(r"transformer\.output_layer\.weight")
    return KeyMap(rules, tuple(ignored))


def _size(vocab: int, **more: object) -> JsonObject:
    return {
        "model_type": "chatglm",
        "padded_vocab_size": vocab,
        "hidden_size": 4096,
        "ffn_hidden_size": 13696,
        "num_layers": 28,
        "num_attention_heads": 32,
        "kv_channels": 128,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "add_qkv_bias": True,
    } | more


FAMILY = Family(
    name="chatglm2",
    model_types=(),
    read_config=read_config,
    write_config=write_config,
    keymap=keymap,
    sizes={
        "chatglm2-6b": _size(65024, seq_length=32768),
        "chatglm3-6b": _size(65024, seq_length=8192),
    },
    gguf=GGUF,
    write_gguf=write_gguf,
)
