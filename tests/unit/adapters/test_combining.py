"""Sums of named adapters: exact or truncated with the error, and selected per request."""

import pytest
import torch

from easyllm.adapters import IA3Config, LoRAConfig, adapter_of, attach, combine, detach
from easyllm.adapters.combining import formula
from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, SamplingParams
from tiny_models import build_tiny
from trained_adapters import ADDITIVE, METHODS, as_named, attached

IDS = torch.arange(5, 45)


def model_with(tmp_path, **configs):
    model = build_tiny()
    for seed, (name, config) in enumerate(configs.items()):
        as_named(model, tmp_path / name, config, name, seed=seed)
    return model


def updates(model, name):
    """Returns ΔW of each linear."""
    return {
        layer: adapter.merged(linear.weight, None)[0] - linear.weight
        for layer, (linear, adapter) in adapter_of(model, name).linears.items()
    }


@pytest.mark.parametrize("method", ADDITIVE)
def test_a_sum_is_exact_with_the_ranks_added_up(tmp_path, method):
    few = LoRAConfig(rank=2, targets=("q_proj", "layers.1.feed_forward.down_proj"))
    model = model_with(tmp_path, a=METHODS[method], b=few)
    before = model.logits(IDS, adapter="a")
    combined = combine(model, {"a": 0.7, "b": -0.3}, name="c")
    assert combined.error == 0
    assert adapter_of(model, "c") is combined.adapters
    assert repr(combined) == "Combined(name='c')"  # without its matrices
    a, b, c = (updates(model, name) for name in "abc")
    assert c.keys() == a.keys()
    for layer, found in c.items():
        expected = 0.7 * a[layer] - 0.3 * b.get(layer, torch.zeros(()))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    ranks = [len(m.lora_A) for _, m in adapter_of(model, "c").linears.values()]
    assert len(set(ranks)) > 1
    assert torch.equal(model.logits(IDS, adapter="a"), before)
    detach(model, "c")
    assert "c" not in model.adapter_sets


def test_a_rank_gives_the_best_approximation_and_its_error(tmp_path):
    model = model_with(tmp_path, a=METHODS["lora"], b=METHODS["lora"])
    combined = combine(model, {"a": 1, "b": 2}, name="c", rank=3)
    a, b, c = (updates(model, name) for name in "abc")
    lost = norm = 0.0
    for layer, found in c.items():
        exact = a[layer] + 2 * b[layer]
        s = torch.linalg.svdvals(exact.double())
        best = float(s[3:].norm() / s.norm())
        assert torch.linalg.matrix_rank(found.double(), rtol=1e-4) == 3
        assert float((found - exact).norm() / exact.norm()) == pytest.approx(best, rel=1e-3)
        assert combined.factors[layer].error == pytest.approx(best, rel=1e-3)
        lost, norm = lost + float(s[3:].square().sum()), norm + float(s.square().sum())
    assert combined.error == pytest.approx((lost / norm) ** 0.5, rel=1e-3)
    exact = combine(model, {"a": 1, "b": 2}, name="exact", rank=8)
    assert exact.error == 0


def test_updates_that_depend_on_the_weight_need_a_rank(tmp_path):
    model = model_with(tmp_path, a=METHODS["dora"], b=METHODS["lora"], i=IA3Config())
    with pytest.raises(ConfigError, match="give the rank of the result"):
        combine(model, {"a": 1, "b": 1})
    assert set(model.adapter_sets) == {"a", "b", "i"}
    full = combine(model, {"a": 0.5, "b": 1, "i": -1}, name="full", rank=64)
    assert full.error < 1e-5
    a, b, i, found = (updates(model, name) for name in ("a", "b", "i", "full"))
    for layer, update in found.items():
        expected = 0.5 * a[layer] + b[layer] - i.get(layer, torch.zeros(()))
        torch.testing.assert_close(update, expected, atol=1e-4, rtol=1e-3)
    rough = combine(model, {"a": 0.5, "b": 1, "i": -1}, name="rough", rank=2)
    assert 0.01 < rough.error < 1


def test_a_request_selects_the_sum_like_any_adapter(tmp_path, tiny_tokenizer):
    model = model_with(tmp_path, a=METHODS["lora"], b=METHODS["rslora"])
    llm = LLM(model=model, tokenizer=tiny_tokenizer, max_running=4)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompt = [5, 6, 7, 8]
    before = llm.generate([prompt, prompt], params, adapter=["a", "b"])
    assert combine(model, {"a": 1, "b": 1}).name == "a+b"
    after = llm.generate([prompt] * 4, params, adapter=["a", "b", "a+b", ""])
    assert [c.token_ids for c in after[:2]] == [c.token_ids for c in before]
    merged = build_tiny()
    with torch.no_grad():
        for layer, update in updates(model, "a+b").items():
            merged.get_submodule(layer).weight.add_(update)
    alone = LLM(model=merged, tokenizer=tiny_tokenizer, max_running=4)
    expected = alone.generate([prompt], params)[0]
    assert after[2].token_ids == expected.token_ids
    assert after[2].token_ids != after[3].token_ids


def test_the_default_name_is_the_formula():
    assert formula({"a": 1, "b": 1}) == "a+b"
    assert formula({"a": 0.7, "b": -0.3, "c": -1}) == "0.7*a-0.3*b-c"


def test_what_is_no_sum_of_updates_is_refused(tmp_path):
    model = model_with(tmp_path, a=METHODS["lora"])
    with pytest.raises(ConfigError, match="no adapter 'x'"):
        combine(model, {"x": 1})
    with pytest.raises(ConfigError, match="already has an adapter 'a'"):
        combine(model, {"a": 2}, name="a")
    with pytest.raises(ConfigError, match="rank=0 is not positive"):
        combine(model, {"a": 2}, rank=0)
    with pytest.raises(ConfigError, match="at least one"):
        combine(model, {})
    other = build_tiny()
    attach(other, METHODS["lora"])
    with pytest.raises(ConfigError, match="only named adapters"):
        combine(other, {"": 2})
    biased = build_tiny(attention_bias=True)
    attached(biased, IA3Config())
    detach(biased)
    from easyllm.adapters import save_adapter
    from easyllm.models import add_adapter, hf_module_name

    attached(biased, IA3Config())
    save_adapter(biased, tmp_path / "i", module_name=hf_module_name(biased), base="tiny")
    detach(biased)
    add_adapter(biased, tmp_path / "i", name="i")
    with pytest.raises(ConfigError, match="also changes the bias of layers"):
        combine(biased, {"i": 1}, rank=4)
    assert set(biased.adapter_sets) == {"i"}
