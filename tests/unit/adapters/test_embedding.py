"""Adapters of the token embedding: low-rank updates, and rows trained in full."""

import json

import pytest
import torch

from adapter_kinds import model_with
from easyllm.adapters import LoRAConfig, attach, load_adapter, merge, save_adapter
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.models import hf_module_name, load_model, save_model
from easyllm.nn.context import ForwardContext
from easyllm.quant import quantize_weights
from tiny_models import build_tiny

IDS = torch.arange(5, 45)
ROWS = LoRAConfig(rank=2, targets=("q_proj",), trained_tokens=(40, 5, 9))
LOW = LoRAConfig(rank=3, alpha=6, targets=("embed_tokens",))


def test_a_low_rank_update_is_added_to_the_vectors_but_not_to_a_tied_head():
    model, adapters = model_with(LOW, tie_word_embeddings=True)
    _, rows = adapters.embeddings["embed_tokens"]
    table = model.embed_tokens.weight + 2.0 * (rows.lora_embedding_B @ rows.lora_embedding_A).T
    torch.testing.assert_close(model.embed_tokens(IDS), table[IDS])
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.head(hidden), hidden @ model.embed_tokens.weight.T)
    x, weight = model.loss_factors(hidden)
    torch.testing.assert_close(x @ weight.T, model.head(hidden))


def test_merging_a_low_rank_update_unties_the_head(tmp_path):
    model, _ = model_with(LOW, tie_word_embeddings=True)
    before, table = model.logits(IDS), model.embed_tokens.weight.clone()
    merge(model)
    assert not model.config.tie_embeddings
    assert torch.equal(model.lm_head.weight, table)
    assert not torch.allclose(model.embed_tokens.weight, table)
    torch.testing.assert_close(model.logits(IDS), before, atol=1e-5, rtol=1e-5)
    save_model(model, tmp_path / "merged")
    assert torch.equal(load_model(tmp_path / "merged").logits(IDS), model.logits(IDS))


def test_merging_trained_rows_keeps_a_head_tied():
    model, _ = model_with(ROWS, tie_word_embeddings=True)
    merge(model)
    assert model.config.tie_embeddings
    assert model.lm_head is None


@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows_replace_those_of_the_embedding_and_of_a_tied_head(tied):
    model, adapters = model_with(ROWS, trained=0, tie_word_embeddings=tied)
    base = model.logits(IDS)
    _, rows = adapters.embeddings["embed_tokens"]
    with torch.no_grad():
        rows.delta.copy_(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)))
    vectors = model.embed_tokens(torch.tensor([5, 6, 9, 40, 319]))
    assert torch.equal(vectors[[3, 0, 2]], rows.delta)
    assert torch.equal(vectors[[1, 4]], model.embed_tokens.weight[[6, 319]])
    hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    logits, plain = model.head(hidden), hidden @ model.head_weight.T
    changed = ((logits - plain).abs().amax(0) > 1e-4).nonzero().flatten().tolist()
    assert changed == ([5, 9, 40] if tied else [])
    if tied:
        torch.testing.assert_close(logits[:, [40, 5, 9]], hidden @ rows.delta.T)
    x, weight = model.loss_factors(hidden)
    torch.testing.assert_close(x @ weight.T, logits)
    assert not torch.allclose(model.logits(IDS), base)


def test_the_loss_reaches_trained_rows_through_the_embedding_and_the_tied_head():
    """The gradients are those of the three rows of a fully trained embedding."""
    model, adapters = model_with(ROWS, trained=0, tie_word_embeddings=True)
    full = build_tiny(attention_bias=True, mlp_bias=True).requires_grad_(True)
    for one in (model, full):
        hidden = one(IDS, ForwardContext.packed([len(IDS)]))
        x, weight = one.loss_factors(hidden)
        torch.nn.functional.cross_entropy((x @ weight.T)[:-1], IDS[1:]).backward()
    _, rows = adapters.embeddings["embed_tokens"]
    expected = full.embed_tokens.weight.grad[[40, 5, 9]]
    torch.testing.assert_close(rows.delta.grad, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [((7, 320), "names token 320, but the model's ids end at 319"), ((1 << 40,), "ids end at 319")],
)
def test_tokens_beyond_the_vocabulary_are_refused(tokens, words):
    with pytest.raises(ConfigError, match=words):
        attach(build_tiny(), LoRAConfig(rank=2, trained_tokens=tokens))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trained_tokens": (7, 9, 7)}, "names token 7 twice"),
        ({"trained_tokens": (7,), "targets": ("embed_tokens",)}, "choose one"),
        ({"trained_tokens": (7,), "also_trained": ("embed_tokens",)}, "choose one"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        LoRAConfig(rank=2, **changes)


def saved(tmp_path, config):
    model, _ = model_with(config)
    where = hf_module_name(model)
    save_adapter(model, tmp_path / "a", module_name=where, base="tiny")
    path = tmp_path / "a" / "adapter_config.json"
    return model, where, path, json.loads(path.read_text())


def test_the_rows_of_a_file_are_in_the_order_of_its_token_ids(tmp_path):
    """peft neither sorts them nor expects them sorted."""
    model, where, path, values = saved(tmp_path, ROWS)
    assert values["trainable_token_indices"] == [40, 5, 9]
    assert values["target_modules"] == ["q_proj"]
    expected = model.logits(IDS)
    path.write_text(json.dumps(values | {"trainable_token_indices": {"embed_tokens": [40, 5, 9]}}))
    again = build_tiny(attention_bias=True, mlp_bias=True)
    load_adapter(again, tmp_path / "a", module_name=where)
    assert torch.equal(again.logits(IDS), expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([5, 9], "trains 2 token rows, but its file has 3"),
        ([5, 9, 5], "token 5 twice"),
        ({"lm_head": [5, 9, 40]}, "trainable_token_indices of 'lm_head'"),
        ([5, 9, 1000], "names token 1000"),
    ],
)
def test_token_ids_that_do_not_fit_the_file_are_refused(given, words, tmp_path):
    _, where, path, values = saved(tmp_path, ROWS)
    path.write_text(json.dumps(values | {"trainable_token_indices": given}))
    with pytest.raises((CheckpointError, ConfigError), match=words):
        load_adapter(build_tiny(), tmp_path / "a", module_name=where)


def test_an_adapter_of_the_embedding_cannot_be_loaded_by_name(tmp_path):
    _, where, _, _ = saved(tmp_path, LOW)
    with pytest.raises(ConfigError, match="changes the token embedding"):
        load_adapter(build_tiny(), tmp_path / "a", module_name=where, name="one")


@pytest.mark.parametrize("config", [LOW, ROWS])
def test_a_quantized_embedding_can_be_adapted_but_not_merged(config):
    model = quantize_weights(build_tiny(), "int8")
    before = model.logits(IDS)
    adapters = attach(model, config)
    # int8 products round their inputs too, those of trained rows do not
    tolerance = 0.1 if config is ROWS else 1e-5
    torch.testing.assert_close(model.logits(IDS), before, atol=tolerance, rtol=tolerance)
    for parameter in adapters.trained_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    assert not torch.allclose(model.logits(IDS), before, atol=1e-2)
    with pytest.raises(ConfigError, match="cannot be merged into quantized weights"):
        merge(model)
