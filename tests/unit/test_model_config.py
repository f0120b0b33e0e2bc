"""Combinations of parts that make no sense are refused when a configuration is made, and say what would do."""

import pytest
from pydantic import ValidationError

from conftest import build_tiny
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.models.context import ContextConfig, extend_context
from easyllm.models.hf_config import read_config, write_config
from easyllm.nn.config import (
    Alibi,
    AttentionConfig,
    GLUConfig,
    LayerConfig,
    LinearAttentionConfig,
    ModelConfig,
    MoEConfig,
    ReRope,
    Rope,
    Sinusoidal,
)

HEADS = {"num_heads": 10, "num_kv_heads": 5, "head_dim": 16}


def test_heads_that_do_not_divide_say_which_numbers_would_do():
    with pytest.raises(ValidationError, match="set num_kv_heads to 1, 2, 5 or 10"):
        AttentionConfig(num_heads=10, num_kv_heads=4, head_dim=16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position": {"kind": "rerope", "window": 4, "slopes": 8}}, "Extra inputs"),
        ({"position": [{"kind": "rerope", "window": 4}, {"kind": "alibi"}]}, "position"),
        ({"position": ReRope(window=4), "causal": False}, "causal attention only"),
        ({"position": Rope(rotary_dim=20)}, "at most head_dim=16"),
        ({"position": Rope(rotary_dim=7)}, "must be even"),
        ({"num_sinks": 4}, "needs a window"),
        ({"num_sinks": 4, "window": 9, "causal": False}, "needs causal attention"),
        ({"logn_length": 1}, "greater than 1"),
        ({"position": {"kind": "rope", "scaling": {"kind": "yarn"}}}, "factor"),
    ],
)
def test_attention_refuses(changes, words):
    with pytest.raises(ValidationError, match=words):
        AttentionConfig(**HEADS | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position": Alibi()}, "position"),
        ({"position": ReRope(window=3)}, "position"),
        ({"position": Rope(), "features": "softmax"}, "needs features elu"),
    ],
)
def test_linear_attention_refuses(changes, words):
    with pytest.raises(ValidationError, match=words):
        LinearAttentionConfig(num_heads=2, head_dim=16, **changes)


def test_experts_refuse_more_choices_than_experts_and_a_gate_without_its_expert():
    expert = GLUConfig(intermediate_size=8)
    with pytest.raises(ValidationError, match="is more than num_experts=2; lower it"):
        MoEConfig(num_experts=2, experts_per_token=3, expert=expert)
    with pytest.raises(ValidationError, match="shared_gate needs a shared expert"):
        MoEConfig(num_experts=2, experts_per_token=1, expert=expert, shared_gate=True)


def test_a_model_refuses_positions_that_do_not_belong_at_the_embedding_and_odd_widths():
    layer = LayerConfig(mixer=AttentionConfig(**HEADS), feed_forward=GLUConfig(intermediate_size=8))
    values = {"family": "llama", "vocab_size": 9, "max_seq_len": 8, "layers": (layer,)}
    with pytest.raises(ValidationError, match="embedding_position"):
        ModelConfig(**values, hidden_size=32, embedding_position=Alibi())
    with pytest.raises(ValidationError, match="must be even"):
        ModelConfig(**values, hidden_size=33, embedding_position=Sinusoidal())


@pytest.mark.parametrize("method", ["pi", "ntk", "dynamic", "yarn"])
def test_a_longer_context_is_written_as_hf_writes_it(method):
    config = extend_context(build_tiny().config, ContextConfig(method=method, factor=2))
    assert config.max_seq_len == 512
    assert read_config(write_config(config)) == config


def test_rectified_positions_have_no_word_in_a_published_layout():
    context = ContextConfig(method="rerope", logn=True)
    config = extend_context(build_tiny().config, context)
    assert config.layers[0].mixer.position == ReRope(theta=10000.0, window=128)
    assert config.layers[0].mixer.logn_length == 256
    with pytest.raises(CheckpointError, match="'llama' cannot represent this model"):
        write_config(config)


def test_a_second_scaling_is_refused():
    config = extend_context(build_tiny().config, ContextConfig(method="yarn"))
    with pytest.raises(ConfigError, match="needs RoPE without scaling in every layer"):
        extend_context(config, ContextConfig(method="pi"))
