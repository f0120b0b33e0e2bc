"""DoRA: the norm without a matrix, and the gradients with the norm held constant."""

import pytest
import torch
from torch.nn import functional as F

from adapter_kinds import model_with
from easyllm.adapters import DoRA, DoRAConfig, attach, detach
from easyllm.core.errors import ConfigError
from easyllm.nn.linear import BaseLinear, Linear
from easyllm.quant import quantize_weights
from tiny_models import build_tiny

IDS = torch.arange(5, 45)


def linear_of(*, bias, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = Linear(24, 17, bias=bias)
    for parameter in linear.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return linear.requires_grad_(False).to(dtype)


def adapter_of(linear, *, rank=3, scale=1.7, dropout=0.0):
    adapter = DoRA(rank, scale, 24, 17, dropout=dropout)
    generator = torch.Generator().manual_seed(1)
    adapter.reset_parameters(generator)
    adapter.start(linear, generator)
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapter


def naive(adapter, linear, x):
    """The formula of the paper with whole matrices, the norm without gradient."""
    moved = linear.weight + adapter.scale * adapter.lora_B @ adapter.lora_A
    norm = moved.norm(dim=1).detach()
    return F.linear(x, (adapter.magnitude / norm)[:, None] * moved, linear.bias)


def test_the_norm_equals_that_of_the_whole_matrix():
    linear = linear_of(bias=False, dtype=torch.float32)
    adapter = adapter_of(linear)
    moved = linear.weight + adapter.scale * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(adapter._norm(BaseLinear(linear)), moved.norm(dim=1))


def test_the_norm_of_a_row_that_vanishes_is_not_nan():
    linear = linear_of(bias=False, dtype=torch.float32)
    adapter = adapter_of(linear)
    with torch.no_grad():
        linear.weight.zero_()
        adapter.lora_B.zero_()
    assert bool(adapter(torch.ones(2, 24), BaseLinear(linear)).isfinite().all())


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_equal_those_of_the_formula(bias):
    linear = linear_of(bias=bias, dtype=torch.float32)
    adapter = adapter_of(linear)
    x = torch.randn(11, 24, generator=torch.Generator().manual_seed(2), requires_grad=True)
    target = torch.randn(11, 17, generator=torch.Generator().manual_seed(3))
    inputs = [x, *adapter.parameters()]
    got, expected = adapter(x, BaseLinear(linear)), naive(adapter, linear, x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad((got * target).sum(), inputs)
    for own, reference in zip(
        gradients, torch.autograd.grad((expected * target).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(own, reference, atol=2e-5, rtol=2e-5)


def test_a_gradient_through_the_norm_would_be_another():
    """Otherwise the test above could not fail."""
    linear = linear_of(bias=False, dtype=torch.float32)
    adapter, x = adapter_of(linear), torch.ones(2, 24)
    moved = linear.weight + adapter.scale * adapter.lora_B @ adapter.lora_A
    through = F.linear(x, (adapter.magnitude / moved.norm(dim=1))[:, None] * moved).sum()
    (one,) = torch.autograd.grad(through, adapter.lora_B)
    (other,) = torch.autograd.grad(naive(adapter, linear, x).sum(), adapter.lora_B)
    assert not torch.allclose(one, other, atol=1e-3)


def test_the_magnitude_starts_as_the_norm_of_the_rows():
    model = build_tiny()
    adapters = attach(model, DoRAConfig(rank=2))
    for linear, adapter in adapters.linears.values():
        torch.testing.assert_close(adapter.magnitude.detach(), linear.weight.norm(dim=1))
    detach(model)


def test_the_norm_follows_the_model_to_another_dtype():
    model, adapters = model_with("dora")
    model.logits([5, 6, 7])
    model.to(torch.bfloat16)
    model.logits([5, 6, 7])
    for linear, adapter in adapters.linears.values():
        expected = linear.weight.float().norm(dim=1)
        torch.testing.assert_close(adapter.row_norms, expected)


def test_dropout_drops_the_update_alone():
    """The base's own product has no dropout, unlike in peft."""
    linear = linear_of(bias=True, dtype=torch.float32)
    adapter = adapter_of(linear, dropout=0.5).train()
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    got = adapter(x, BaseLinear(linear))
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    factor = adapter.magnitude / adapter._norm(BaseLinear(linear))
    update = adapter.scale * dropped @ adapter.lora_A.T @ adapter.lora_B.T
    expected = factor * (x @ linear.weight.T + update) + linear.bias
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_factors_of_the_loss_give_the_output(dropout):
    linear = linear_of(bias=False, dtype=torch.float32)
    adapter = adapter_of(linear, dropout=dropout).train()
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    expected = adapter(x, BaseLinear(linear))
    torch.manual_seed(0)
    left, right = adapter.loss_factors(x, linear.weight)
    torch.testing.assert_close(left @ right.T, expected, atol=1e-5, rtol=1e-5)


def test_the_embedding_is_refused_as_a_target():
    with pytest.raises(ConfigError, match="'embed_tokens' matches no linear layer"):
        attach(build_tiny(), DoRAConfig(rank=2, targets=("embed_tokens",)))


def test_the_norms_follow_a_base_that_is_quantized_later():
    model, adapters = model_with("dora")
    model.logits(IDS)
    quantize_weights(model, "nf4")
    got = model.logits(IDS)
    for _, adapter in adapters.linears.values():
        adapter.row_norms = None
    assert torch.equal(model.logits(IDS), got)
