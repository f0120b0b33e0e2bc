"""PiSSA: the start from singular vectors, and files that fit the original base."""

import json

import pytest
import torch
from safetensors.torch import load_file

from adapter_kinds import BIASES, model_with
from easyllm.adapters import LoRA, LoRAConfig, PiSSAConfig, attach, load_adapter, save_adapter
from easyllm.adapters.pissa import largest_singular
from easyllm.core.errors import ConfigError
from easyllm.models import hf_module_name
from easyllm.nn.linear import Linear
from easyllm.quant import quantize_weights
from tiny_models import build_tiny

IDS = torch.arange(5, 45)


def decaying(rows, columns, seed=0):
    """A matrix whose singular values decay, as those of trained weights do."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator))
    count = min(rows, columns)
    s = 1 / torch.arange(1, count + 1)
    return (u[:, :count] * s) @ v[:count]


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
@pytest.mark.parametrize("iterations", [0, 4, None])
def test_the_largest_singular_values_are_found(shape, iterations):
    weight = decaying(*shape)
    u, s, v = largest_singular(weight, 5, iterations, torch.Generator().manual_seed(1))
    exact = torch.linalg.svdvals(weight)
    assert (u.shape, v.shape) == ((shape[0], 5), (5, shape[1]))
    torch.testing.assert_close(u.T @ u, torch.eye(5), atol=1e-5, rtol=0)
    tolerance = {0: 0.3, 4: 1e-3, None: 1e-5}[iterations]
    torch.testing.assert_close(s, exact[:5], rtol=tolerance, atol=0)
    best = exact[5:].square().sum().sqrt()  # error of the best approximation (Eckart-Young)
    error = torch.linalg.matrix_norm(weight - (u * s) @ v)
    assert best * (1 - 1e-4) <= error <= best * (1.2 if iterations == 0 else 1.001)


def test_the_randomised_method_follows_the_seed():
    weight = decaying(60, 50)
    one, same, other = (
        largest_singular(weight, 3, 1, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one[0], same[0])
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("scale", [{"alpha": 9}, {"alpha": 9, "rslora": True}])
def test_the_start_is_the_best_approximation_of_the_weight(scale):
    model = build_tiny()
    adapters = attach(model, PiSSAConfig(rank=3, iterations=None, **scale))
    for linear, adapter in adapters.linears.values():
        u, s, v = torch.linalg.svd(linear.weight, full_matrices=False)
        expected = (u[:, :3] * s[:3]) @ v[:3]
        update = adapter.scale * adapter.lora_B @ adapter.lora_A
        torch.testing.assert_close(update, expected, atol=1e-5, rtol=1e-4)
        # both matrices have a part of equal size
        torch.testing.assert_close(adapter.lora_A.norm(dim=1), adapter.lora_B.norm(dim=0))


def test_a_saved_adapter_is_a_lora_of_twice_the_rank_for_the_original_base(tmp_path):
    config = PiSSAConfig(
        rank=2, alpha=6, targets=("q_proj", "up_proj"), rank_pattern={"up_proj": 3}
    )
    model, _ = model_with(config)
    where = hf_module_name(model)
    save_adapter(model, tmp_path / "a", module_name=where, base="tiny")
    values = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (values["r"], values["lora_alpha"]) == (4, 12)
    assert set(values["rank_pattern"].values()) == {6}
    assert "init_lora_weights" not in values
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {len(t) for name, t in tensors.items() if "lora_A" in name} == {4, 6}
    again = build_tiny(**BIASES)
    adapters = load_adapter(again, tmp_path / "a", module_name=where)
    assert isinstance(adapters.config, LoRAConfig)
    assert all(type(adapter) is LoRA for _, adapter in adapters.linears.values())
    torch.testing.assert_close(again.logits(IDS), model.logits(IDS), atol=1e-5, rtol=1e-5)


def test_a_quantized_base_stays_as_it_is():
    model = quantize_weights(build_tiny(), "int8")
    before = model.logits(IDS)
    adapters = attach(model, PiSSAConfig(rank=2, iterations=None))
    torch.testing.assert_close(model.logits(IDS), before, atol=1e-5, rtol=1e-5)
    linear, adapter = adapters.linears["layers.0.mixer.q_proj"]
    u, s, v = torch.linalg.svd(linear.storage.dense(), full_matrices=False)
    update = adapter.scale * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(update, (u[:, :2] * s[:2]) @ v[:2], atol=1e-3, rtol=1e-2)


def test_a_rank_above_that_of_a_router_starts_the_rest_as_lora_does():
    router = Linear(32, 4).requires_grad_(False)
    router.reset_parameters(0.3, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    adapter = PiSSAConfig(rank=6, alpha=6).build("layers.0.feed_forward.router", 32, 4)
    adapter.reset_parameters(generator)
    adapter.start(router, generator)
    torch.testing.assert_close(adapter.lora_B @ adapter.lora_A, router.weight, atol=1e-5, rtol=0)
    assert not bool(adapter.lora_B[:, 4:].any())
    assert bool(adapter.lora_A[4:].any())


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"rate_ratio": 4}, ValueError, "rate_ratio=4 applies to the matrix that starts at zero"),
        ({"targets": ("embed_tokens",)}, ConfigError, "'embed_tokens' matches no linear layer"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes, error, words):
    with pytest.raises(error, match=words):
        attach(build_tiny(), PiSSAConfig(rank=2, **changes))
