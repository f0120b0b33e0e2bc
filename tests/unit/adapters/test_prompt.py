"""Prompt tuning: initial values, and which settings are refused."""

import logging

import pytest
import torch
from pydantic import ValidationError

from easyllm.adapters import PromptTuningConfig, attach
from easyllm.core.errors import ConfigError
from easyllm.quant import quantize_weights
from tiny_models import build_tiny


def start(model, seed=0, **values):
    config = PromptTuningConfig(**values)
    return attach(model, config, seed=seed).model_adapter.vectors().detach()


def test_random_vectors_are_standard_normal_and_follow_the_seed():
    vectors = start(build_tiny(), num_virtual_tokens=200, init="random")
    assert vectors.shape == (200, 32)
    assert vectors.mean().abs() < 0.05
    assert vectors.std() == pytest.approx(1, abs=0.05)
    again = start(build_tiny(), num_virtual_tokens=200, init="random")
    other = start(build_tiny(), num_virtual_tokens=200, init="random", seed=1)
    assert torch.equal(vectors, again)
    assert not torch.equal(vectors, other)


@pytest.mark.parametrize("packed", [False, True])
def test_vectors_from_the_vocabulary_are_rows_of_the_embedding(packed):
    model = build_tiny()
    if packed:
        model = quantize_weights(model, "int8")
    table = model.embed_tokens(torch.arange(320)).float()
    vectors = start(model, num_virtual_tokens=50)
    equal = (vectors[:, None] == table[None]).all(-1)
    assert equal.any(1).all()
    assert equal.any(0).sum() > 30  # not one row for all


def test_vectors_from_a_text_repeat_or_truncate_it(caplog):
    model = build_tiny()
    table = model.embed_tokens.storage.dense()

    def encode(text):
        return [ord(letter) for letter in text]

    for n, expected in ((7, "abcabca"), (3, "abc")):
        config = PromptTuningConfig(num_virtual_tokens=n, init="text", init_text="abc")
        vectors = attach(build_tiny(), config.with_token_ids(encode)).model_adapter.vectors()
        assert torch.equal(vectors, table[encode(expected)])
    config = PromptTuningConfig(num_virtual_tokens=2, init="text", init_text="abc")
    with caplog.at_level(logging.WARNING):
        config = config.with_token_ids(encode)
    assert "init_text has 3 tokens, of which the first 2 are used" in caplog.text
    vectors = attach(build_tiny(), config).model_adapter.vectors()
    assert torch.equal(vectors, table[encode("ab")])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init": "text"}, "init=text needs a text; set init_text"),
        ({"init": "text", "init_text": ""}, "init=text needs a text; set init_text"),
        ({"init_text": "abc"}, "init_text has no effect with init=vocabulary; set init=text"),
        ({"targets": ("q_proj",)}, "has no effect on an adapter of kind prompt"),
        ({"num_virtual_tokens": 0}, "greater than 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        PromptTuningConfig(**values)


def test_texts_without_ids_and_with_foreign_ids_are_refused():
    text = PromptTuningConfig(init="text", init_text="abc")
    with pytest.raises(ConfigError, match=r"call config\.with_token_ids"):
        attach(build_tiny(), text)
    with pytest.raises(ConfigError, match="'abc' has no tokens"):
        text.with_token_ids(lambda _: [])
    model = build_tiny()
    with pytest.raises(ConfigError, match="contains 320, but the model has 320 tokens"):
        attach(model, text.with_token_ids(lambda _: [5, 320]))
    assert not model.is_adapted


def test_as_many_virtual_tokens_as_positions_are_refused():
    with pytest.raises(ConfigError, match="num_virtual_tokens=256 leaves no position"):
        attach(build_tiny(), PromptTuningConfig(num_virtual_tokens=256))
    attach(build_tiny(), PromptTuningConfig(num_virtual_tokens=255))
