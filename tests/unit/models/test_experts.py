"""Upcycling, merging and gates: a mixture of equal experts is the dense model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from easyllm.core.errors import ConfigError
from easyllm.models import load_model, save_model
from easyllm.models.experts import ExpertChange, merge_experts, similar_groups, upcycle
from easyllm.nn.config import GLUConfig, MoEConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.moe import MoE
from tiny_models import build_tiny

IDS = torch.arange(5, 45)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "gemma"])
def test_identical_experts_equal_the_dense_model_and_merge_back_to_it(model_type):
    model = build_tiny(model_type=model_type)
    before = model.logits(IDS)
    upcycle(model, 4, 2)
    assert model.config.has_experts
    torch.testing.assert_close(model.logits(IDS), before, atol=1e-5, rtol=1e-5)
    merge_experts(model, 2)
    torch.testing.assert_close(model.logits(IDS), before, atol=1e-5, rtol=1e-5)
    merge_experts(model, 1)
    assert not model.config.has_experts
    torch.testing.assert_close(model.logits(IDS), before, atol=1e-5, rtol=1e-5)


def test_an_upcycled_model_is_a_mixtral_for_transformers(tmp_path):
    model = upcycle(build_tiny(tie_word_embeddings=False), 4, noise=0.1)
    assert model.config.family == "mixtral"
    folder = save_model(model, tmp_path / "moe")
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected = theirs(IDS[None]).logits[0]
    torch.testing.assert_close(load_model(folder).logits(IDS), expected, atol=3e-5, rtol=0)


def test_similar_experts_are_merged_first():
    vectors = [torch.tensor(v) for v in ([1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.1, 1.0])]
    assert similar_groups(vectors, 2) == [(0, 2), (1, 3)]
    assert similar_groups(vectors, 4) == [(0,), (1,), (2,), (3,)]


def test_what_cannot_be_changed_is_refused():
    gpt = build_tiny(model_type="gpt2", n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(ConfigError, match="feed-forward of kind mlp"):
        upcycle(gpt, 4)
    with pytest.raises(ConfigError, match="no experts to merge"):
        merge_experts(build_tiny(), 2)
    mixture = upcycle(build_tiny(), 4)
    with pytest.raises(ConfigError, match="4 experts, which cannot be merged into 4"):
        merge_experts(mixture, 4)
    with pytest.raises(ConfigError, match="is a mixture already"):
        ExpertChange(2, noise=0.1).apply(mixture)


def moe_of(**options):
    values = {"num_experts": 4, "experts_per_token": 2, "expert": GLUConfig(intermediate_size=8)}
    layer = MoE(MoEConfig(**values | options), 16, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return layer


def test_noise_on_the_router_is_in_training_alone_and_of_the_learned_width():
    layer, x = moe_of(gate="noisy_top_k").requires_grad_(False), torch.randn(4000, 16)
    context = ForwardContext.packed([4000])
    logits = layer.router(x)
    width = torch.nn.functional.softplus(layer.gate.noise(x))
    torch.manual_seed(0)
    drawn = (layer.gate.disturbed(logits, x, context) - logits) / width
    assert drawn.mean().abs() < 0.05
    assert drawn.std().item() == pytest.approx(1, abs=0.05)
    layer.eval()
    assert torch.equal(layer.gate.disturbed(logits, x, context), logits)
    assert torch.equal(layer(x, context), layer(x, context))


def test_the_second_expert_is_used_with_twice_its_weight():
    layer = moe_of(gate="random_second")
    weights = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]]).repeat_interleave(4000, 0)
    torch.manual_seed(0)
    skipped = layer.gate.skipped(weights).view(3, 4000, 2).float().mean(1)
    assert skipped[:, 0].tolist() == [0, 0, 0]
    assert skipped[:, 1].tolist() == pytest.approx([0.8, 0.2, 0.0], abs=0.03)
    assert layer.eval().gate.skipped(weights) is None


def test_tokens_over_the_capacity_pass_on_the_residual_path_alone():
    layer, x = moe_of(capacity_factor=0.5).requires_grad_(False), torch.randn(16, 16)
    routing = []
    out = layer(x, ForwardContext.packed([16], routing=routing))
    lost = routing[0].dropped.all(-1)
    assert lost.any()
    assert not out[lost].any()
    assert out[~lost].abs().sum(-1).min() > 0
