"""The policy loss: what is clipped, which weights the averagings give, and its gradient."""

import pytest
import torch
from pydantic import ValidationError

from easyllm.rl.kl import KLController, kl_estimate
from easyllm.rl.policy_loss import (
    RATIO_BINS,
    PolicyLossConfig,
    policy_loss,
    ratio_figures,
    token_weights,
)
from easyllm.rl.value_loss import value_loss

LENGTHS = (2, 3, 1)


def logs(seed=0, scale=0.4):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(6, generator=generator, dtype=torch.float64) * 3 - 0.1
    new = old + scale * torch.randn(6, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -0.5, -0.5, -0.5, 2.0], dtype=torch.float64)
    return new.requires_grad_(True), old, advantages


@pytest.mark.parametrize("ratio", ["token", "sequence", "clipped_weight"])
def test_at_ratio_one_the_gradient_is_that_of_the_policy_gradient(ratio):
    """Σ A ∇ log π, for any ratio: nothing is clipped in the first mini-batch."""
    _, old, advantages = logs()
    new = old.clone().requires_grad_(True)
    found = policy_loss(new, old, advantages, LENGTHS, PolicyLossConfig(ratio=ratio))
    (gradient,) = torch.autograd.grad(found.per_token.sum(), new)
    # advantages are equal within an answer, so that means over an answer do not change them
    torch.testing.assert_close(gradient, -advantages)
    assert not bool(found.clipped.any())
    assert torch.equal(found.log_ratio, torch.zeros_like(old))


def test_a_clipped_token_has_no_gradient_and_an_unclipped_one_keeps_it():
    old = torch.zeros(4, dtype=torch.float64)
    new = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    found = policy_loss(new, old, advantages, [4], PolicyLossConfig())
    (gradient,) = torch.autograd.grad(found.per_token.sum(), new)
    assert found.clipped.tolist() == [True, False, False, True]
    ratios = new.detach().exp()
    expected = torch.where(found.clipped, torch.zeros_like(ratios), -advantages * ratios)
    torch.testing.assert_close(gradient, expected)


def test_clip_higher_lets_a_rising_token_rise_further():
    old = torch.zeros(1, dtype=torch.float64)
    new = torch.tensor([0.23], dtype=torch.float64)  # a ratio of 1.26
    one = torch.ones(1, dtype=torch.float64)
    assert not bool(policy_loss(new, old, one, [1], PolicyLossConfig()).clipped)
    low = PolicyLossConfig(clip_high=0.2)
    assert bool(policy_loss(new, old, one, [1], low).clipped)


def test_dual_clip_bounds_the_loss_of_a_negative_advantage():
    old, new = torch.zeros(2), torch.tensor([3.0, 3.0], requires_grad=True)
    advantages = torch.tensor([-1.0, 1.0])
    found = policy_loss(new, old, advantages, [2], PolicyLossConfig(dual_clip=3.0))
    assert found.per_token.tolist() == pytest.approx([3.0, -1.28])
    assert found.clipped.tolist() == [True, True]


def test_an_extreme_ratio_stays_finite():
    old, new = torch.full((1,), -500.0), torch.zeros(1, requires_grad=True)
    found = policy_loss(new, old, -torch.ones(1), [1], PolicyLossConfig())
    assert bool(found.per_token.isfinite().all())
    assert all(torch.isfinite(torch.tensor(v)) for v in ratio_figures(found).values())


def test_the_weights_of_the_averagings():
    like = torch.zeros(1)
    assert token_weights(LENGTHS, "dapo", 8, like).tolist() == [1] * 6
    assert token_weights(LENGTHS, "dr_grpo", 8, like).tolist() == [1 / 8] * 6
    found = token_weights(LENGTHS, "grpo", 8, like)
    torch.testing.assert_close(found, torch.tensor([1 / 2, 1 / 2, *[1 / 3] * 3, 1.0]))


def test_the_histogram_of_ratios_sums_to_one():
    new, old, advantages = logs(scale=1.5)
    figures = ratio_figures(policy_loss(new, old, advantages, LENGTHS, PolicyLossConfig()))
    assert sum(figures[f"rl/ratio/{name}"] for name in RATIO_BINS) == pytest.approx(1)
    assert figures["rl/update_kl_nats"] > 0


def test_dual_clip_of_a_weight_is_refused():
    with pytest.raises(ValidationError, match="remove dual_clip"):
        PolicyLossConfig(ratio="clipped_weight", dual_clip=3.0)


# ---- KL


def test_estimates_of_the_kl_have_the_expectation_of_the_exact_one():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(0)
    q = (p + 0.2 * torch.randn(50, generator=generator, dtype=torch.float64)).log_softmax(0)
    exact = float((p.exp() * (p - q)).sum())
    expected = {k: float((p.exp() * kl_estimate(p, q, k)).sum()) for k in ("k1", "k2", "k3")}
    assert expected["k1"] == pytest.approx(exact)
    assert expected["k3"] == pytest.approx(exact)
    assert expected["k2"] == pytest.approx(exact, rel=0.2)
    assert float(kl_estimate(p, q, "k3").min()) >= 0


@pytest.mark.parametrize(("estimator", "zero"), [("k1", True), ("k2", False)])
def test_the_expected_gradient_of_k1_is_zero_and_that_of_k2_is_the_kl_s(estimator, zero):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, generator=generator, dtype=torch.float64, requires_grad=True)
    q = torch.randn(20, generator=generator, dtype=torch.float64).log_softmax(0)
    p = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    expected = p.detach().exp() * kl_estimate(p, q, estimator)  # E over samples of the estimate
    (found,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(found, torch.zeros_like(found) if zero else exact)


def test_an_extreme_kl_stays_finite():
    found = kl_estimate(torch.tensor([-500.0, 0.0]), torch.tensor([0.0, -500.0]), "k3")
    assert bool(found.isfinite().all())


def test_the_adaptive_coefficient_follows_the_target():
    adaptive, fixed = KLController(0.1, target=1.0), KLController(0.1)
    for controller in (adaptive, fixed):
        controller.update(5.0)
    assert adaptive.coefficient == pytest.approx(0.1 * 1.02)
    assert fixed.coefficient == 0.1
    adaptive.update(0.0)
    assert adaptive.coefficient == pytest.approx(0.1 * 1.02 * 0.98)


# ---- values


def test_a_value_may_only_move_by_the_clip_in_the_direction_of_the_return():
    values = torch.tensor([1.0, 0.1, -3.0], requires_grad=True)
    loss, clipped = value_loss(values, torch.zeros(3), torch.full((3,), 2.0), clip=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert clipped.tolist() == [True, False, False]
    assert loss.tolist() == pytest.approx([0.5 * 1.8**2, 0.5 * 1.9**2, 0.5 * 25])
    assert gradient.tolist() == pytest.approx([0.0, -1.9, -5.0])


def test_without_a_clip_it_is_half_the_squared_error():
    loss, _ = value_loss(torch.tensor([1.0]), torch.zeros(1), torch.tensor([3.0]), clip=None)
    assert float(loss) == 2.0
