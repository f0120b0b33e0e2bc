"""Advantages against direct sums, and against the exact values of the gridworld."""

import pytest
import torch

from easyllm.rl.advantages import (
    explained_variance,
    gae,
    group_relative,
    leave_one_out,
    reinforce_plus_plus,
    whiten,
)
from easyllm.rl.gridworld import build_gridworld
from easyllm.rl.values import evaluate_policy, sample_episode


def random_answers(lengths=(1, 4, 7), width=7):
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    rewards = torch.randn(len(lengths), width, generator=generator, dtype=torch.float64) * mask
    values = torch.randn(len(lengths), width + 1, generator=generator, dtype=torch.float64)
    values[:, :-1] *= mask
    values[:, -1] = 0
    return rewards, values, mask


def direct_gae(rewards, values, mask, gamma, lam):
    found = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        length = int(mask[row].sum())
        for t in range(length):
            for l in range(t, length):
                error = rewards[row, l] + gamma * values[row, l + 1] - values[row, l]
                found[row, t] += (gamma * lam) ** (l - t) * error
    return found


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (0.9, 0.0)])
def test_gae_equals_the_direct_sum(gamma, lam):
    rewards, values, mask = random_answers()
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = direct_gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, (expected + values[:, :-1]) * mask)


def test_lambda_one_gives_monte_carlo_returns_minus_the_values():
    rewards, values, mask = random_answers()
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    for row, length in enumerate(mask.sum(1).tolist()):
        for t in range(length):
            sums = sum(0.9 ** (i - t) * rewards[row, i] for i in range(t, length))
            torch.testing.assert_close(returns[row, t], sums)
            torch.testing.assert_close(advantages[row, t], sums - values[row, t])


def test_lambda_zero_gives_the_one_step_td_errors():
    rewards, values, mask = random_answers()
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    torch.testing.assert_close(advantages, (rewards + 0.9 * values[:, 1:] - values[:, :-1]) * mask)


@pytest.mark.parametrize("lam", [0.0, 0.8, 1.0])
def test_gae_with_the_exact_critic_averages_to_the_advantage_of_the_first_action(lam):
    """In a gridworld: E[Â | s, a] = Q(s, a) - V(s), for any λ, if V is exact."""
    process = build_gridworld(["S.G", ".X."], slip=0.1).process
    policy = torch.full(process.transitions.shape[:2], 0.25, dtype=torch.float64)
    exact = evaluate_policy(process, policy)
    generator = torch.Generator().manual_seed(1)
    found = {}
    for _ in range(2500):
        episode = sample_episode(process, policy, generator)
        rewards = torch.tensor([episode.rewards], dtype=torch.float64)
        values = exact[torch.tensor([episode.states])]
        mask = torch.ones_like(rewards, dtype=torch.bool)
        advantages, _ = gae(rewards, values, mask, gamma=process.discount, lam=lam)
        found.setdefault(episode.actions[0], []).append(float(advantages[0, 0]))
    q = process.action_values(exact)[process.start]
    for action, samples in found.items():
        each = torch.tensor(samples)
        error = abs(float(each.mean()) - float(q[action] - exact[process.start]))
        assert error < 4 * float(each.std()) / len(samples) ** 0.5 + 1e-9


REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 2.0, 0.0, 1.0, 5.0])


def test_group_relative_advantages_have_mean_zero_and_the_scale_that_was_asked_for():
    groups = group_relative(REWARDS, 4).view(3, 4)
    torch.testing.assert_close(groups.mean(1), torch.zeros(3), atol=1e-6, rtol=0)
    std = REWARDS.view(3, 4).std(1)
    plain = group_relative(REWARDS, 4, "none").view(3, 4)
    torch.testing.assert_close(groups, plain / (std[:, None] + 1e-4))
    batch = group_relative(REWARDS, 4, "batch").view(3, 4)
    torch.testing.assert_close(batch, plain / (REWARDS.std() + 1e-4))


@pytest.mark.parametrize("value", [0.1, 0.3, 1e6 / 3])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_zero(value):
    rewards = torch.full((7,), value)
    for found in (group_relative(rewards, 7), leave_one_out(rewards, 7)):
        assert torch.equal(found, torch.zeros(7))
    assert torch.equal(reinforce_plus_plus(rewards, 7), torch.zeros(7))


def test_leave_one_out_compares_with_the_mean_of_the_others():
    found = leave_one_out(REWARDS, 4)
    for i, reward in enumerate(REWARDS.tolist()):
        group = REWARDS.tolist()[i // 4 * 4 : i // 4 * 4 + 4]
        others = (sum(group) - reward) / 3
        assert float(found[i]) == pytest.approx(reward - others, abs=1e-6)
    # equal to the group-relative one without a scale, times n / (n - 1)
    torch.testing.assert_close(found, group_relative(REWARDS, 4, "none") * 4 / 3)


def test_reinforce_plus_plus_normalises_over_the_batch():
    found = reinforce_plus_plus(REWARDS, 4)
    torch.testing.assert_close(found, (REWARDS - REWARDS.mean()) / REWARDS.std())
    centred = REWARDS.view(3, 4) - REWARDS.view(3, 4).mean(1, keepdim=True)
    flat = centred.flatten()
    torch.testing.assert_close(
        reinforce_plus_plus(REWARDS, 4, baseline=True), (flat - flat.mean()) / flat.std()
    )


def test_whitening_ignores_what_is_masked():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, generator=generator) * 4 + 7
    mask = torch.rand(3, 5, generator=generator) > 0.3
    poisoned = values.masked_fill(~mask, float("nan"))
    found = whiten(poisoned, mask)
    assert torch.equal(found[~mask], torch.zeros(int((~mask).sum())))
    assert float(found[mask].mean()) == pytest.approx(0, abs=1e-5)
    assert float(found[mask].var()) == pytest.approx(1, abs=1e-4)
    kept = whiten(poisoned, mask, shift_mean=False)[mask]
    assert float(kept.mean()) == pytest.approx(float(values[mask].mean()), abs=1e-4)
    assert float(kept.var()) == pytest.approx(1, abs=1e-4)


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant_one():
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full((3,), 2.0), returns) == pytest.approx(0, abs=1e-6)
    assert explained_variance(-returns, returns) < 0
