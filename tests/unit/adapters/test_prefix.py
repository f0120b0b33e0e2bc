"""Prefix tuning: the layout of the table, its size, and models without equal keys in each layer."""

import pytest
import torch
from pydantic import ValidationError

from easyllm.adapters import PrefixTuningConfig, attach
from easyllm.core.errors import ConfigError
from easyllm.models.families import family_of
from easyllm.nn.config import AttentionConfig, LinearAttentionConfig
from easyllm.nn.decoder import Decoder
from easyllm.plan.parts import count_adapter_parameters
from tiny_models import build_tiny, tiny_config


def config_of(*mixers):
    """The tiny configuration with one layer for each mixer."""
    config = family_of("llama").read_config(tiny_config(num_hidden_layers=len(mixers)))
    layers = [
        {**layer.model_dump(), "mixer": mixer.model_dump()}
        for layer, mixer in zip(config.layers, mixers, strict=True)
    ]
    return config.changed(layers=layers)


def test_a_row_holds_keys_then_values_of_each_layer():
    adapter = PrefixTuningConfig(num_virtual_tokens=3).build_model_adapter(build_tiny().config)
    with torch.no_grad():  # 2 layers, 2 heads of 16: slots of 32
        adapter.table.embedding.copy_(torch.arange(3 * 4 * 32).view(3, -1))
    (k0, v0), (k1, v1) = adapter.keys_values()
    for slot, part in enumerate((k0, v0, k1, v1)):
        assert part.shape == (3, 2, 16)
        assert part[1, 0, 0] == 4 * 32 + 32 * slot
        assert part[1, 1, 5] == 4 * 32 + 32 * slot + 16 + 5


def test_the_number_of_parameters_of_a_published_size():
    """Ten tokens of 24 layers with keys of width 1024, as the examples of peft."""
    sizes = {"num_hidden_layers": 24, "num_key_value_heads": 16, "num_attention_heads": 16}
    config = family_of("llama").read_config(tiny_config(head_dim=64, **sizes))
    assert count_adapter_parameters(config, PrefixTuningConfig(num_virtual_tokens=10)) == 491_520
    projected = PrefixTuningConfig(num_virtual_tokens=10, projection=True, encoder_hidden_size=512)
    mlp = (1024 + 1) * 512 + (512 + 1) * 24 * 2 * 1024
    assert count_adapter_parameters(config, projected) == 10 * 1024 + mlp


@pytest.mark.parametrize("projection", [False, True])
def test_a_start_at_zero_gives_keys_and_values_of_zero(projection):
    config = PrefixTuningConfig(projection=projection, init="zero")
    for pair in attach(build_tiny(), config).model_adapter.keys_values():
        assert not any(part.any() for part in pair)
    random = PrefixTuningConfig(projection=projection)
    assert all(k.any() for k, _ in attach(build_tiny(), random).model_adapter.keys_values())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prefix_starts_as_real_tokens_in_front_of_the_text(family):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 320}
    values = tiny_config() if family == "llama" else sizes | {"model_type": "gpt2"}
    model = Decoder(family_of(family).read_config(values)).eval()
    model.reset_parameters(std=0.3, generator=torch.Generator().manual_seed(0))
    text, ids = list(range(5, 45)), (7, 8, 9, 10)
    expected = model.logits([*ids, *text])[4:]
    config = PrefixTuningConfig(num_virtual_tokens=4, init="text", init_token_ids=ids)
    attach(model, config)
    torch.testing.assert_close(model.logits(text), expected, atol=1e-4, rtol=0)


def test_without_a_text_the_tokens_are_random_and_the_seed_decides():
    def table(**changes):
        model = build_tiny()
        return attach(model, PrefixTuningConfig(**changes), seed=3).model_adapter.table.embedding

    assert torch.equal(table(), table(init="vocabulary"))
    assert table(init="random").std() > 0.9
    assert not torch.equal(table(), table(init="random"))


def test_layers_without_equal_keys_are_refused():
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16)
    linear = LinearAttentionConfig(num_heads=4, head_dim=16)
    prefix = PrefixTuningConfig()
    with pytest.raises(ConfigError, match="layer 1 is linear attention, which has none"):
        prefix.build_model_adapter(config_of(attention, linear))
    other = attention.model_copy(update={"num_kv_heads": 4})
    with pytest.raises(ConfigError, match=r"layers have 2 x 16, 4 x 16 \(heads x dimension\)"):
        prefix.build_model_adapter(config_of(attention, other))
    windowed = attention.model_copy(update={"window": 8})
    assert prefix.build_model_adapter(config_of(attention, windowed)).num_virtual == 20


def test_a_hidden_size_without_a_projection_is_refused():
    with pytest.raises(ValidationError, match="encoder_hidden_size=8 has no effect without a"):
        PrefixTuningConfig(encoder_hidden_size=8)
    with pytest.raises(ValidationError, match="init=vocabulary sets keys and values, which an MLP"):
        PrefixTuningConfig(projection=True, init="vocabulary")
    with pytest.raises(ValidationError, match="init_text has no effect with init=random"):
        PrefixTuningConfig(projection=True, init_text="abc")
