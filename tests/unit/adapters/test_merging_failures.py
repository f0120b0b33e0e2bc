"""Merging: rounding, failures without a trace, and what remains attached."""

import pytest
import torch

from adapter_kinds import config_of, model_with, shake
from easyllm.adapters import (
    Adapter,
    LoRAConfig,
    adapter_of,
    attach,
    merge,
    save_adapter,
)
from easyllm.core.errors import ConfigError
from easyllm.models import add_adapter, hf_module_name
from easyllm.quant import quantize_weights
from tiny_models import build_tiny

IDS = torch.arange(5, 45)


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa", "adalora", "ia3"])
def test_a_bf16_weight_is_rounded_once(kind):
    model, adapters = model_with(kind, trained=0)
    model.to(torch.bfloat16)
    for adapter in [adapter for _, adapter in adapters.linears.values()]:
        adapter.float()
    shake(model, adapters, 0.05)
    expected = {}
    with torch.no_grad():
        for name, (linear, adapter) in adapters.linears.items():
            bias = None if linear.bias is None else linear.bias.float()
            weight, _ = adapter.merged(linear.weight.float(), bias)
            expected[name] = weight.to(torch.bfloat16)
    merge(model)
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight)


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa", "adalora", "ia3", "lora, token rows"])
def test_quantized_weights_are_not_merged_and_the_adapter_stays(kind):
    model, adapters = quantized(kind)
    before = model.logits(IDS)
    with pytest.raises(ConfigError, match=r"stored as int8.*unquantized model, then quantize"):
        merge(model)
    assert adapter_of(model) is adapters
    assert torch.equal(model.logits(IDS), before)


def quantized(kind):
    model = quantize_weights(build_tiny(attention_bias=True, mlp_bias=True), "int8")
    adapters = attach(model, config_of(kind))
    shake(model, adapters, 0.05)
    return model, adapters


def test_a_failure_midway_leaves_an_equivalent_model(monkeypatch):
    model, adapters = model_with("lora")
    before = model.logits(IDS)
    _, last = list(adapters.linears.values())[-1]

    def fail(*_):
        raise NotImplementedError

    monkeypatch.setattr(last, "merged", fail)
    with pytest.raises(NotImplementedError):
        merge(model)
    assert len(adapters.linears) == 1
    torch.testing.assert_close(model.logits(IDS), before, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_adds_a_bias_to_a_linear_without_one_is_not_merged():
    class Shift(Adapter):
        def merged(self, weight, bias):
            return weight, torch.ones(len(weight))

    model = build_tiny()
    adapters = attach(model, LoRAConfig(rank=2, targets=("q_proj",)))
    name, (linear, _) = next(iter(adapters.linears.items()))
    adapters.linears[name] = linear, Shift()
    with pytest.raises(ConfigError, match=f"adds a bias to {name}, which has none"):
        merge(model)


def test_one_of_two_named_adapters_is_not_merged(tmp_path):
    model, _ = model_with(LoRAConfig(rank=2))
    save_adapter(model, tmp_path / "a", module_name=hf_module_name(model), base="tiny")
    held = build_tiny(attention_bias=True, mlp_bias=True)
    for name in ("one", "two"):
        add_adapter(held, tmp_path / "a", name=name)
    with pytest.raises(ConfigError, match="merging 'one' would change the base of 'two'"):
        merge(held, "one")
    with pytest.raises(ConfigError, match="no unnamed adapter"):
        merge(held)
