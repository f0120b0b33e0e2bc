"""Terms of the loss beyond plain cross-entropy: router losses, soft-capped logits."""

import pytest
import torch
from torch.nn import functional as F

from easyllm.batches.packing import pack
from easyllm.examples.sample import Sample
from easyllm.models import to_classifier
from easyllm.nn import Decoder
from easyllm.nn.config import AttentionConfig, GLUConfig, LayerConfig, ModelConfig, MoEConfig
from easyllm.nn.moe import load_balancing_loss, router_z_loss
from easyllm.ops.cross_entropy import linear_cross_entropy
from easyllm.train.loop import accumulate
from easyllm.train.objectives import (
    DPO,
    KTO,
    ORPO,
    Distillation,
    DistillationConfig,
    DPOConfig,
    KTOConfig,
    LanguageModel,
    Reference,
    Reward,
)
from preference_rows import random_batch
from tiny_models import build_tiny


def moe_model(vocab_size=50, **changes):
    experts = MoEConfig(
        num_experts=4, experts_per_token=2, expert=GLUConfig(intermediate_size=24), **changes
    )
    mixer = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=16)
    layer = LayerConfig(mixer=mixer, feed_forward=experts)
    config = ModelConfig(
        family="mixtral", vocab_size=vocab_size, hidden_size=32, max_seq_len=64, layers=(layer,) * 2
    )
    model = Decoder(config)
    model.reset_parameters(std=0.2, generator=torch.Generator().manual_seed(0))
    return model


def batch_of(*lengths):
    generator = torch.Generator().manual_seed(1)
    samples = []
    for n in lengths:
        ids = torch.randint(0, 50, (n + 1,), generator=generator).tolist()
        samples.append(Sample.from_mask(ids))
    return pack(samples)


def test_router_losses_are_added_with_their_coefficients_and_reported_separately():
    model, batch = moe_model(load_balancing=0.5, z_loss=0.25), batch_of(9, 20)
    loss, metrics = accumulate(model, LanguageModel(), [batch])
    routing = []
    hidden = model(batch.token_ids, batch.context(routing=routing))
    plain = F.cross_entropy(model.head(hidden), batch.labels)
    assert loss == pytest.approx(plain.item(), rel=1e-5)
    assert metrics["router/load_balancing"] == pytest.approx(
        sum(load_balancing_loss(r).item() for r in routing) / 2, rel=1e-5
    )
    whole = plain + sum(0.5 * load_balancing_loss(r) + 0.25 * router_z_loss(r) for r in routing) / 2
    for name, parameter in model.named_parameters():
        expected = torch.autograd.grad(whole, parameter, retain_graph=True)[0]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["dpo", "kto", "orpo", "reward"])
def test_preference_objectives_add_the_router_losses_too(kind):
    model = moe_model(vocab_size=320, load_balancing=0.5, z_loss=0.25)
    batch = random_batch((6, 4, 7), (3, 5, 2), whole=kind == "reward")
    objective = {
        "dpo": DPO(DPOConfig(reference="cached")),
        "kto": KTO(KTOConfig(reference="cached")),
        "orpo": ORPO(),
        "reward": Reward(),
    }[kind]
    objective.cached_reference = {}
    if kind == "reward":
        model = to_classifier(model, 1)
    if kind == "kto":
        batch.extras.update(is_good=torch.tensor([1.0, 0, 1, 0]), match=torch.ones(4))
    output = objective.loss(model, batch)
    routing = []
    model(batch.token_ids, batch.context(routing=routing))
    losses = [0.5 * load_balancing_loss(r) + 0.25 * router_z_loss(r) for r in routing]
    expected = output.num_tokens * torch.stack(losses).mean()
    torch.testing.assert_close(output.auxiliary, expected)
    assert output.auxiliary.requires_grad
    assert output.metrics["router/z"] > 0


def test_without_coefficients_the_routers_add_nothing():
    batch = batch_of(12)
    with_terms, without = (
        moe_model(load_balancing=0.5),
        moe_model(load_balancing=0.0),
    )
    for model in (with_terms, without):
        accumulate(model, LanguageModel(), [batch])
    name = "layers.0.feed_forward.router.weight"
    assert not torch.allclose(with_terms.get_parameter(name).grad, without.get_parameter(name).grad)


def test_training_with_the_load_balancing_loss_balances_the_experts():
    spread = {}
    for coefficient in (0.0, 1.0):
        model, batch = moe_model(load_balancing=coefficient), batch_of(60, 60)
        with torch.no_grad():  # every router initially prefers one expert
            for layer in model.layers:
                layer.feed_forward.router.weight[0] += 0.3
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60):
            _, metrics = accumulate(model, LanguageModel(), [batch])
            optimizer.step()
            optimizer.zero_grad()
        spread[coefficient] = metrics["router/load_variation"]
    assert spread[1.0] < 0.6 * spread[0.0]


@pytest.mark.parametrize("cap", [5.0, 30.0])
def test_soft_capped_cross_entropy_and_its_gradients_equal_the_formula(cap):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator).requires_grad_(True)
    weight = (3 * torch.randn(90, 16, generator=generator)).requires_grad_(True)
    labels = torch.randint(0, 90, (37,), generator=generator)
    labels[::5] = -100
    out = linear_cross_entropy(hidden, weight, labels, softcap=cap, chunk_rows=8)
    got = torch.autograd.grad(out.sum, (hidden, weight))
    logits = cap * torch.tanh(hidden @ weight.T / cap)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(out.sum, expected, rtol=1e-5, atol=1e-4)
    for a, b in zip(got, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_distillation_is_the_mix_of_cross_entropy_and_the_teachers_divergence():
    model, teacher, batch = build_tiny().requires_grad_(True), build_tiny(seed=1), batch_of(9, 20)
    config = DistillationConfig(teacher="teacher", temperature=2.0, weight=0.3)
    objective = Distillation(config)
    objective.reference = Reference(model=teacher, without_adapter=False)
    out = objective.loss(model, batch)
    context = batch.context()
    logits = model.head(model(batch.token_ids, context))
    wanted = teacher.head(teacher(batch.token_ids, context))
    ce = F.cross_entropy(logits, batch.labels, reduction="sum")
    p = (wanted / 2).softmax(-1)
    kl = (p * (p.log() - (logits / 2).log_softmax(-1))).sum()
    expected = 0.7 * ce + 0.3 * 4 * kl
    torch.testing.assert_close(out.sum, expected, rtol=1e-5, atol=1e-4)
    assert out.metrics["teacher_kl_nats"] == pytest.approx(kl.item() / 29, rel=1e-4)
    weight = model.layers[0].mixer.q_proj.weight
    ours, theirs = (torch.autograd.grad(x, weight)[0] for x in (out.sum, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
