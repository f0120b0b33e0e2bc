"""Invalid combinations of parts are refused on creation, naming valid alternatives."""

import pytest
from pydantic import ValidationError

from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.models.context import ContextConfig, extend_context
from easyllm.models.hf_config import read_config, write_config
from easyllm.nn.config import (
    AttentionConfig,
    GLUConfig,
    LayerConfig,
    LinearAttentionConfig,
    ModelConfig,
    MoEConfig,
)
from easyllm.nn.position_config import Alibi, ReRope, Rope, Sinusoidal
from tiny_models import build_tiny

HEADS = {"num_heads": 10, "num_kv_heads": 5, "head_dim": 16}


def test_the_error_for_invalid_head_counts_lists_valid_ones():
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
def test_invalid_attention_options_are_refused(changes, words):
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
def test_invalid_linear_attention_options_are_refused(changes, words):
    with pytest.raises(ValidationError, match=words):
        LinearAttentionConfig(num_heads=2, head_dim=16, **changes)


def test_more_choices_than_experts_and_a_gate_without_its_expert_are_refused():
    expert = GLUConfig(intermediate_size=8)
    with pytest.raises(ValidationError, match="is more than num_experts=2; lower it"):
        MoEConfig(num_experts=2, experts_per_token=3, expert=expert)
    with pytest.raises(ValidationError, match="shared_gate needs a shared expert"):
        MoEConfig(num_experts=2, experts_per_token=1, expert=expert, shared_gate=True)


def test_positions_not_applicable_to_embeddings_and_odd_widths_are_refused():
    layer = LayerConfig(mixer=AttentionConfig(**HEADS), feed_forward=GLUConfig(intermediate_size=8))
    values = {"family": "llama", "vocab_size": 9, "max_seq_len": 8, "layers": (layer,)}
    with pytest.raises(ValidationError, match="embedding_position"):
        ModelConfig(**values, hidden_size=32, embedding_position=Alibi())
    with pytest.raises(ValidationError, match="must be even"):
        ModelConfig(**values, hidden_size=33, embedding_position=Sinusoidal())


@pytest.mark.parametrize("method", ["pi", "ntk", "dynamic", "yarn"])
def test_an_extended_context_is_written_like_hugging_face(method):
    config = extend_context(build_tiny().config, ContextConfig(method=method, factor=2))
    assert config.max_seq_len == 512
    assert read_config(write_config(config)) == config


def test_rectified_positions_cannot_be_represented_in_a_published_format():
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
