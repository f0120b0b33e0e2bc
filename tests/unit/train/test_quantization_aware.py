"""Quantization-aware training: rounded forward, straight-through backward, full weights saved."""

import pytest
import torch
from pydantic import ValidationError

from easyllm.core.errors import ConfigError
from easyllm.models import load_model, save_model
from easyllm.quant.rtn import rtn
from easyllm.train import TrainConfig
from easyllm.train.objectives.quantization_aware import (
    QuantizationAware,
    QuantizationAwareConfig,
    StraightThroughWeight,
)
from tiny_models import build_tiny

IDS = torch.arange(5, 37)


def prepared(**values):
    config = QuantizationAwareConfig(**({"bits": 3, "group_size": 16} | values))
    return QuantizationAware(config).prepare_model(build_tiny(), seed=0), config.spec


def test_the_forward_pass_is_that_of_the_model_rounded_to_nearest():
    model, spec = prepared()
    rounded = build_tiny()
    for name, layer in rounded.weight_modules():
        if name.startswith("layers."):
            layer.weight.data.copy_(rtn(layer.weight, spec).dequantize())
    torch.testing.assert_close(model.logits(IDS), rounded.logits(IDS))
    assert not torch.allclose(model.logits(IDS), build_tiny().logits(IDS), atol=1e-2)


def test_the_gradient_ignores_the_rounding():
    model, spec = prepared()
    layer = model.layers[0].mixer.q_proj
    assert isinstance(layer.storage, StraightThroughWeight)
    layer.weight.requires_grad_()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    grad = 2 * y.detach()
    torch.testing.assert_close(layer.weight.grad, grad.T @ x.detach())
    torch.testing.assert_close(x.grad, grad @ rtn(layer.weight.detach(), spec).dequantize())


def test_the_full_weights_are_saved(tmp_path):
    model, _ = prepared()
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert not again.packed_formats()
    assert torch.equal(again.logits(IDS), build_tiny().logits(IDS))


def test_an_adapter_would_leave_the_rounded_weights_untrained():
    values = {
        "data": {"train": ["rows.jsonl"]},
        "objective": {"kind": "quantization_aware"},
        "adapter": {"kind": "lora"},
        "batch_size": 4,
    }
    with pytest.raises(ValidationError, match="set adapter=null"):
        TrainConfig.model_validate(values)
    TrainConfig.model_validate(values | {"adapter": None})


def test_a_grid_that_does_not_suit_the_model_is_refused():
    with pytest.raises(ConfigError, match="does not divide 32 inputs"):
        prepared(group_size=48)
