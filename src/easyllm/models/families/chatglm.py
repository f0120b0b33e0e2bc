"""ChatGLM-6B: a bidirectional prompt, two-dimensional RoPE, and post-norm with α = √(2L).

The model answers in a block that starts after `[gMASK]` with the BOS token; tokens of the block
have the position of the mask and, in a second row, their number in the block (Du et al. 2021, arXiv
2103.10360). A layer of its code adds to α times the *normed* stream, N(x) α + f(N(x)), after a norm
of the embedding: these are the values of post-norm layers, N(α x + f(x)), whose norms are named one
step later. `config.json` files of ChatGLM2 and 3 have the same `model_type`.
"""

import math

from easyllm.checkpoint.keymap import Fused, KeyMap, Rename, Rule, renames
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonObject
from easyllm.models.families import chatglm2
from easyllm.models.families.family import (
    Family,
    HFConfig,
    expect_part,
    num_layers,
    read_token_ids,
    refuse,
    require,
    with_defaults,
    write_token_ids,
)
from easyllm.models.families.row_order import joined_halves, reordered_qkv
from easyllm.nn.config import AttentionConfig, LayerConfig, LayerNormConfig, MLPConfig, ModelConfig
from easyllm.nn.position_config import BlockRope

_DEFAULTS = {"layernorm_epsilon": 1e-5, "max_sequence_length": 2048}


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts a `config.json` of `model_type` `chatglm`, of either generation."""
    if chatglm2.is_second(hf):
        return chatglm2.read_config(hf)
    hf = with_defaults(hf, _DEFAULTS)
    refuse(hf, {"position_encoding_2d": True, "quantization_bit": 0, "pre_seq_len": None})
    hidden, heads = require(hf, "hidden_size"), require(hf, "num_attention_heads")
    count = num_layers(hf, "num_layers")
    mixer = AttentionConfig(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        position=BlockRope(),
        qkv_bias=True,
        out_bias=True,
    )
    inner = hf.get("inner_hidden_size") or 4 * hidden
    layer = LayerConfig(
        mixer=mixer,
        feed_forward=MLPConfig(intermediate_size=inner, activation="gelu_tanh"),
        norm_placement="post",
        residual_scale=math.sqrt(2 * count),
    )
    return ModelConfig(
        family="chatglm",
        vocab_size=require(hf, "vocab_size"),
        hidden_size=hidden,
        max_seq_len=hf["max_sequence_length"],
        layers=(layer,) * count,
        norm=LayerNormConfig(eps=hf["layernorm_epsilon"]),
        embedding_norm=True,
        final_norm=False,
        tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
        prompt_mask="prefix_before_last",
        **read_token_ids(hf),
    )


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a ChatGLM-6B model.

    Its code also needs the ids of the masks, which precede that of BOS in all its vocabularies.
    """
    mixer = expect_part(config.layers[0].mixer, AttentionConfig)
    mlp = expect_part(config.layers[0].feed_forward, MLPConfig)
    if not config.embedding_norm:
        raise CheckpointError("it has no norm after the embedding, but ChatGLM has one")
    masks: JsonObject = {}
    if config.bos_token_id is not None and config.bos_token_id >= 4:
        first = config.bos_token_id
        masks = {"mask_token_id": first - 4, "gmask_token_id": first - 3}
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "inner_hidden_size": mlp.intermediate_size,
        "num_layers": config.num_layers,
        "num_attention_heads": mixer.num_heads,
        "layernorm_epsilon": config.norm.eps,
        "max_sequence_length": config.max_seq_len,
        "position_encoding_2d": True,
        "tie_word_embeddings": config.tie_embeddings,
        **masks,
        **write_token_ids(config),
    }


_LINEARS = {
    "mixer.o_proj": "attention.dense",
    "feed_forward.up_proj": "mlp.dense_h_to_4h",
    "feed_forward.down_proj": "mlp.dense_4h_to_h",
    "mixer_after_norm": "post_attention_layernorm",
}


def keymap(config: ModelConfig) -> KeyMap:
    """Returns the key map; queries, keys and values of one head after another are fused."""
    mixer = expect_part(config.layers[0].mixer, AttentionConfig)
    heads, dim, last = mixer.num_heads, mixer.head_dim, config.num_layers - 1
    order = joined_halves(heads, dim)
    rules: list[Rule] = []
    for kind in ("weight", "bias"):
        names = tuple(f"layers.{{i}}.mixer.{part}_proj.{kind}" for part in "qkv")
        theirs = f"transformer.layers.{{i}}.attention.query_key_value.{kind}"
        rules.append(reordered_qkv(Fused(names, theirs, (dim,) * 3, groups=heads), order, order))
        pairs = [
            (f"layers.{{i}}.{a}.{kind}", f"transformer.layers.{{i}}.{b}.{kind}")
            for a, b in _LINEARS.items()
        ]
        after = [f"transformer.layers.{i + 1}.input_layernorm" for i in range(last)]
        after.append("transformer.final_layernorm")
        pairs += [
            (f"layers.{i}.feed_forward_after_norm.{kind}", f"{name}.{kind}")
            for i, name in enumerate(after)
        ]
        pairs.append((f"embedding_norm.{kind}", f"transformer.layers.0.input_layernorm.{kind}"))
        rules += renames(pairs)
    rules.append(Rename("embed_tokens.weight", "transformer.word_embeddings.weight"))
    rules.append(Rename("lm_head.weight", "lm_head.weight"))
    ignored = [r"transformer\.layers\.\d+\.attention\.rotary_emb\.inv_freq"]
    if config.tie_embeddings:
        ignored.append(r"lm_head\.weight")
    return KeyMap(rules, tuple(ignored))


FAMILY = Family(
    name="chatglm",
    model_types=("chatglm",),
    read_config=read_config,
    write_config=write_config,
    keymap=keymap,
    sizes={
        "chatglm-6b": {
            "model_type": "chatglm",
            "vocab_size": 130528,
            "hidden_size": 4096,
            "inner_hidden_size": 16384,
            "num_layers": 28,
            "num_attention_heads": 32,
            "max_sequence_length": 2048,
            "bos_token_id": 130004,
            "eos_token_id": 130005,
            "pad_token_id": 3,
        }
    },
)
