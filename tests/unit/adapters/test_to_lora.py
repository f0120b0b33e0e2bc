"""Every method that merges becomes a LoRA adapter, with the error that truncation costs."""

import pytest
import torch

from easyllm.adapters import (
    AdaLoRAConfig,
    BitFitConfig,
    DoRAConfig,
    IA3Config,
    LoRAConfig,
    adapter_of,
    attach,
    detach,
    merge,
    save_adapter,
    to_lora,
    unmerge,
)
from easyllm.adapters import factors as factors_module
from easyllm.adapters.registry import unregister_adapter
from easyllm.core.errors import ConfigError
from easyllm.models import add_adapter, hf_module_name
from registered_parts import PromptConfig, WeightNormConfig
from tiny_models import build_tiny
from trained_adapters import ADDITIVE, METHODS, attached, train

IDS = torch.arange(5, 45)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_converted_at_full_rank_gives_equal_logits(method):
    model = attached(build_tiny(), METHODS[method])
    logits, base = model.logits(IDS), build_tiny().logits(IDS)
    converted = to_lora(model, 64)
    assert converted.error < 1e-5
    assert adapter_of(model).config.kind == "lora"
    torch.testing.assert_close(model.logits(IDS), logits, atol=2e-3, rtol=1e-3)
    assert torch.equal(detach(model).logits(IDS), base)


@pytest.mark.parametrize("method", METHODS)
def test_the_error_is_that_of_the_best_approximation(method):
    model = attached(build_tiny(), METHODS[method])
    exact = {
        name: adapter.merged(layer.weight, None)[0] - layer.weight
        for name, (layer, adapter) in adapter_of(model).linears.items()
    }
    converted = to_lora(model, 2)
    assert converted.factors.keys() == exact.keys()
    for name, update in exact.items():
        s = torch.linalg.svdvals(update.double())
        found = adapter_of(model).linears[name][1].delta()
        best = float(s[2:].norm() / s.norm())
        measured = float((found - update).norm() / update.norm())
        assert measured == pytest.approx(best, rel=2e-3, abs=1e-5)
        assert converted.factors[name].error == pytest.approx(best, rel=2e-3, abs=1e-5)


def test_ranks_that_suffice_are_kept():
    model = attached(build_tiny(), METHODS["rslora"])
    assert to_lora(model, 16).error == 0
    ranks = {name: len(m.lora_A) for name, (_, m) in adapter_of(model).linears.items()}
    assert {rank for name, rank in ranks.items() if name.endswith("q_proj")} == {2}
    assert {rank for name, rank in ranks.items() if not name.endswith("q_proj")} == {3}


@pytest.mark.parametrize("kind", ADDITIVE)
def test_the_randomised_decomposition_of_large_matrices_is_near_the_best(kind, monkeypatch):
    monkeypatch.setattr(factors_module, "EXACT", 0)
    model = attached(build_tiny(hidden_size=96), DoRAConfig(rank=3))
    (layer, adapter) = adapter_of(model).linears["layers.0.mixer.q_proj"]
    exact = adapter.merged(layer.weight, None)[0] - layer.weight
    s = torch.linalg.svdvals(exact.double())
    found = to_lora(model, 5).factors["layers.0.mixer.q_proj"]
    assert found.error == pytest.approx(float(s[5:].norm() / s.norm()), rel=0.02)


def test_biases_and_modules_are_kept_and_peft_reads_the_file(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from easyllm.models import save_model

    config = DoRAConfig(rank=2, targets=("q_proj", "down_proj"), bias="adapted")
    base = build_tiny(attention_bias=True)
    save_model(base, tmp_path / "base")
    model = attached(base, config, also_trained=("norm",))
    logits = model.logits(IDS)
    to_lora(model, 64)
    torch.testing.assert_close(model.logits(IDS), logits, atol=2e-3, rtol=1e-3)
    save_adapter(model, tmp_path / "a", module_name=hf_module_name(model), base="tiny")
    again = add_adapter(build_tiny(attention_bias=True), tmp_path / "a")
    torch.testing.assert_close(again.logits(IDS), model.logits(IDS), atol=1e-5, rtol=1e-5)
    reference = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "a"
    )
    with torch.no_grad():
        expected = reference(IDS[None]).logits[0]
    torch.testing.assert_close(again.logits(IDS), expected, atol=5e-4, rtol=1e-3)


def test_token_rows_are_kept(tmp_path):
    model = attached(build_tiny(), DoRAConfig(rank=2, trained_tokens=(7, 9)))
    rows = model.embed_tokens.adapter.delta.clone()
    to_lora(model, 4)
    assert torch.equal(model.embed_tokens.adapter.delta, rows)
    assert adapter_of(model).config.trained_tokens == (7, 9)
    save_adapter(model, tmp_path / "a", module_name=hf_module_name(model), base="tiny")
    again = add_adapter(build_tiny(), tmp_path / "a")
    torch.testing.assert_close(again.logits(IDS), model.logits(IDS), atol=1e-5, rtol=1e-5)


def test_an_adapter_of_the_embedding_becomes_one_of_lower_rank(tmp_path):
    config = LoRAConfig(rank=4, targets=("q_proj", "embed_tokens"))
    model = attached(build_tiny(tie_word_embeddings=False), config)
    logits = model.logits(IDS)
    found = to_lora(model, 2)
    assert found.factors["embed_tokens"].down.shape == (2, 32)
    assert 0.05 < found.error < 1
    changed = model.logits(IDS)
    assert not torch.allclose(changed, logits, atol=1e-3)
    save_adapter(model, tmp_path / "a", module_name=hf_module_name(model), base="tiny")
    again = add_adapter(build_tiny(tie_word_embeddings=False), tmp_path / "a")
    torch.testing.assert_close(again.logits(IDS), changed, atol=1e-5, rtol=1e-5)


def test_a_converted_adapter_of_a_file_still_restores_the_base(tmp_path):
    trained = attached(build_tiny(), DoRAConfig(rank=2), also_trained=("norm",))
    save_adapter(trained, tmp_path / "a", module_name=hf_module_name(trained), base="tiny")
    model = build_tiny()
    base = model.logits(IDS)
    add_adapter(model, tmp_path / "a")
    to_lora(model, 64)
    adapted = model.logits(IDS)
    merge(model, reversible=True)
    torch.testing.assert_close(model.logits(IDS), adapted, atol=2e-4, rtol=1e-3)
    assert torch.equal(detach(unmerge(model)).logits(IDS), base)


def test_a_method_of_ones_own_is_converted_and_virtual_tokens_are_refused():
    from easyllm.adapters import register_adapter

    register_adapter(WeightNormConfig, peft_type="TEST_NORM")
    register_adapter(PromptConfig, peft_type="TEST_PROMPT")
    try:
        model = attached(build_tiny(), WeightNormConfig(rank=3))
        logits = model.logits(IDS)
        assert to_lora(model, 64).error < 1e-5
        torch.testing.assert_close(model.logits(IDS), logits, atol=2e-3, rtol=1e-3)
        prompt = attached(build_tiny(), PromptConfig())
        with pytest.raises(ConfigError, match="virtual tokens do not update a weight"):
            to_lora(prompt, 4)
        assert prompt.is_adapted
    finally:
        unregister_adapter("test_weight_norm")
        unregister_adapter("test_prompt")


def test_what_has_no_low_rank_form_is_refused_and_stays():
    biased = attached(build_tiny(attention_bias=True), IA3Config())
    with pytest.raises(ConfigError, match=r"changes the bias of layers\.0\.mixer\.k_proj"):
        to_lora(biased, 4)
    assert adapter_of(biased).config.kind == "ia3"
    trained = attached(build_tiny(), BitFitConfig(parameters=("*norm*",)))
    with pytest.raises(ConfigError, match="only trains parameters of the base"):
        to_lora(trained, 4)
    with pytest.raises(ConfigError, match="rank of a LoRA adapter is 0"):
        to_lora(attached(build_tiny(), METHODS["lora"]), 0)


def test_a_linear_whose_triplets_are_all_pruned_has_a_zero_update():
    model = build_tiny()
    adapters = attach(model, AdaLoRAConfig(init_rank=4, rank=2))
    train(adapters, model)
    for _, adapter in list(adapters.linears.values())[:3]:
        adapter.keeps.fill_(False)
        adapter.lora_E.data.zero_()
    before = model.logits(IDS)
    conversion = to_lora(model, 8)
    torch.testing.assert_close(model.logits(IDS), before, atol=2e-5, rtol=2e-5)
    assert min(len(a.lora_A) for _, a in conversion.adapters.linears.values()) == 1
