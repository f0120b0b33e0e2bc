"""BitFit: which parameters are trained, and what a file contains."""

import pytest
import torch
from safetensors.torch import load_file

from adapter_kinds import BIASES, model_with, shake
from easyllm.adapters import (
    BitFitConfig,
    adapter_of,
    attach,
    detach,
    load_adapter,
    merge,
    save_adapter,
)
from easyllm.batches.packing import pack
from easyllm.core.errors import ConfigError
from easyllm.examples.sample import Sample
from easyllm.models import hf_module_name
from easyllm.quant import quantize_weights
from easyllm.train.objectives import LanguageModel
from tiny_models import build_tiny

IDS = torch.arange(5, 45)


def names_of(*parameters, **changes):
    model = build_tiny(**{**BIASES, **changes})
    return set(attach(model, BitFitConfig(parameters=parameters)).base_parameters)


def test_patterns_select_parameters():
    every = {name for name, _ in build_tiny(**BIASES).named_parameters()}
    assert names_of("*bias") == {name for name in every if name.endswith("bias")}
    assert names_of("*norm*") == {name for name in every if "norm" in name}
    assert names_of("norm.weight") == {"norm.weight"}
    assert names_of("layers.0.*norm*") == {
        "layers.0.mixer_norm.weight",
        "layers.0.feed_forward_norm.weight",
    }
    both = names_of("norm.weight", "q_proj.bias")
    assert both == {"norm.weight", "layers.0.mixer.q_proj.bias", "layers.1.mixer.q_proj.bias"}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (("*bias",), r"adapter.parameters '\*bias' matches no parameter"),
        (("norm.weight", "nrm.weight"), "'nrm.weight' matches no parameter"),
    ],
)
def test_patterns_that_match_nothing_are_refused(parameters, words):
    with pytest.raises(ConfigError, match=words):
        attach(build_tiny(), BitFitConfig(parameters=parameters))


def test_only_the_selected_parameters_are_trained_and_saved(tmp_path):
    model, adapters = model_with(BitFitConfig(parameters=("q_proj.bias", "norm.weight")))
    assert not model.is_adapted
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapters.base_parameters)
    where = hf_module_name(model)
    save_adapter(model, tmp_path / "a", module_name=where, base="tiny")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.model.") for name in tensors} == {
        "layers.0.self_attn.q_proj.bias",  # not the weights of the same linears
        "layers.1.self_attn.q_proj.bias",
        "norm.weight",
    }
    again = build_tiny(**BIASES)
    before = again.logits(IDS)
    load_adapter(again, tmp_path / "a", module_name=where)
    assert torch.equal(again.logits(IDS), model.logits(IDS))
    assert torch.equal(detach(again).logits(IDS), before)


def test_merging_keeps_the_trained_values():
    model, _ = model_with(BitFitConfig())
    trained = model.logits(IDS)
    merge(model)
    assert not model.adapter_sets
    assert torch.equal(model.logits(IDS), trained)
    with pytest.raises(ConfigError, match="no unnamed adapter"):
        adapter_of(model)


def test_the_biases_and_norms_of_a_quantized_model_are_trained():
    model = quantize_weights(build_tiny(**BIASES), "int8")
    before = model.logits(IDS)
    adapters = attach(model, BitFitConfig(parameters=("*bias", "*norm*")))
    assert torch.equal(model.logits(IDS), before)
    shake(model, adapters, 0.1)
    assert not torch.allclose(model.logits(IDS), before, atol=1e-2)
    with pytest.raises(ConfigError, match="is quantized"):
        attach(quantize_weights(build_tiny(), "int8"), BitFitConfig(parameters=("q_proj.weight",)))


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_every_bias_of_a_quantized_model_gets_its_gradient(scheme):
    """Those of the first layer too, whose input has no gradient."""
    model = quantize_weights(build_tiny(**BIASES), scheme).train()
    adapters = attach(model, BitFitConfig(parameters=("*bias",)))
    batch = pack([Sample.from_mask(tuple(IDS.tolist()))])
    LanguageModel().loss(model, batch).sum.backward()
    for name in adapters.base_parameters:
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        # a constant added to all keys changes no attention weight
        assert name.endswith("k_proj.bias") or bool(gradient.any()), name
