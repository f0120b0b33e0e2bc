"""GLM (Du et al. 2021, arXiv 2103.10360): the blank-infilling model before ChatGLM.

A GPT with a bidirectional prompt and two tables of learned positions: in the text, and in the
generated block. Its `config.json` has the `model_type` that GLM-4 took over in `transformers`
(`glm4.read_config` tells them apart).
"""

from easyllm.checkpoint.keymap import Fused, KeyMap, Rule, renames
from easyllm.core.json_types import JsonObject
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
from easyllm.nn.config import AttentionConfig, LayerConfig, LayerNormConfig, MLPConfig, ModelConfig
from easyllm.nn.position_config import BlockLearned, NoPosition

MARK = "block_position_encoding"
"""Key that tells GLM's `config.json` from one of GLM-4."""
_DEFAULTS = {"max_sequence_length": 512, "layernorm_epsilon": 1e-5}


def read_config(hf: HFConfig) -> ModelConfig:
    """Converts the `config.json` of a GLM model to a `ModelConfig`."""
    hf = with_defaults(hf, _DEFAULTS)
    refuse(hf, {MARK: True, "relative_encoding": False, "spell_length": None})
    hidden, heads = require(hf, "hidden_size"), require(hf, "num_attention_heads")
    mixer = AttentionConfig(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        position=NoPosition(),
        qkv_bias=True,
        out_bias=True,
    )
    layer = LayerConfig(
        mixer=mixer,
        feed_forward=MLPConfig(intermediate_size=4 * hidden, activation="gelu_tanh"),
    )
    return ModelConfig(
        family="glm_blocks",
        vocab_size=require(hf, "vocab_size"),
        hidden_size=hidden,
        max_seq_len=hf["max_sequence_length"],
        layers=(layer,) * num_layers(hf, "num_layers"),
        norm=LayerNormConfig(eps=hf["layernorm_epsilon"]),
        embedding_position=BlockLearned(),
        tie_embeddings=True,
        prompt_mask="prefix_before_last",
        **read_token_ids(hf),
    )


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values of a GLM model."""
    mixer = expect_part(config.layers[0].mixer, AttentionConfig)
    return {
        "architectures": ["GLMForConditionalGeneration"],
        "model_type": "glm",
        MARK: True,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "num_attention_heads": mixer.num_heads,
        "max_sequence_length": config.max_seq_len,
        "layernorm_epsilon": config.norm.eps,
        **write_token_ids(config),
    }


_PARTS = {
    "mixer_norm": "input_layernorm",
    "mixer.o_proj": "attention.dense",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.up_proj": "mlp.dense_h_to_4h",
    "feed_forward.down_proj": "mlp.dense_4h_to_h",
}


def keymap(config: ModelConfig) -> KeyMap:
    """Returns the key map, with fused queries, keys and values."""
    rules: list[Rule] = []
    layer = "glm.transformer.layers.{i}."
    for kind in ("weight", "bias"):
        names = tuple(f"layers.{{i}}.mixer.{part}_proj.{kind}" for part in "qkv")
        fused = f"{layer}attention.query_key_value.{kind}"
        rules.append(Fused(names, fused, (config.hidden_size,) * 3))
        rules += renames(
            (f"layers.{{i}}.{a}.{kind}", f"{layer}{b}.{kind}") for a, b in _PARTS.items()
        )
        rules += renames([(f"norm.{kind}", f"glm.transformer.final_layernorm.{kind}")])
    outside = {
        "embed_tokens.weight": "glm.word_embeddings.weight",
        "embedding_position.weight": "glm.transformer.position_embeddings.weight",
        "embedding_position.block_weight": "glm.transformer.block_position_embeddings.weight",
    }
    return KeyMap([*rules, *renames(outside.items())])


FAMILY = Family(
    name="glm_blocks",
    model_types=(),
    read_config=read_config,
    write_config=write_config,
    keymap=keymap,
    sizes={
        "glm-10b": {
            "model_type": "glm",
            MARK: True,
            "vocab_size": 50304,
            "hidden_size": 4096,
            "num_layers": 48,
            "num_attention_heads": 64,
            "max_sequence_length": 1024,
        }
    },
)
