"""Policy losses and gradients against references written from the papers, answer by answer.

The references loop over answers and tokens in plain Python with fp64 tensors; nothing of the
package's vectorised code is used in them.
"""

import pytest
import torch

from easyllm.rl.advantages import gae, group_relative, leave_one_out
from easyllm.rl.policy_loss import PolicyLossConfig, policy_loss, token_weights
from easyllm.rl.value_loss import value_loss

LENGTHS, MOST, GROUP = (3, 1, 5, 4), 6, 2
REWARDS = [1.0, 0.0, 0.2, 0.9]


def tensors(scale=0.5):
    generator = torch.Generator().manual_seed(5)
    old = -torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64) * 2 - 0.05
    moved = scale * torch.randn(sum(LENGTHS), generator=generator, dtype=torch.float64)
    return (old + moved).requires_grad_(True), old


def advantages_of(kind):
    """Advantages per answer, from the papers' formulas."""
    found = []
    for i, reward in enumerate(REWARDS):
        group = REWARDS[i // GROUP * GROUP : i // GROUP * GROUP + GROUP]
        mean = sum(group) / GROUP
        if kind == "rloo":  # Ahmadian et al. 2024, eq. 8
            found.append(reward - (sum(group) - reward) / (GROUP - 1))
        elif kind == "dr_grpo":  # Liu et al. 2025, eq. 2
            found.append(reward - mean)
        else:  # Shao et al. 2024, section 4.1.2, with the sample deviation
            deviation = (sum((r - mean) ** 2 for r in group) / (GROUP - 1)) ** 0.5
            found.append((reward - mean) / (deviation + 1e-4))
    return found


def per_answer(values):
    return values.split(list(LENGTHS))


def reference(new, old, each, averaging, low, high):
    """GRPO's objective, eq. 3 of Shao et al. 2024, and its averagings."""
    terms, tokens = [], sum(LENGTHS)
    for log_new, log_old, advantage in zip(per_answer(new), per_answer(old), each, strict=True):
        answer = []
        for t in range(len(log_new)):
            ratio = torch.exp(log_new[t] - log_old[t])
            clipped = torch.clamp(ratio, 1 - low, 1 + high)
            answer.append(torch.min(ratio * advantage, clipped * advantage))
        total = torch.stack(answer).sum()
        match averaging:
            case "grpo":
                terms.append(total / len(answer) / len(LENGTHS))
            case "dr_grpo":
                terms.append(total / MOST / len(LENGTHS))
            case "dapo":
                terms.append(total / tokens)
    return -torch.stack(terms).sum()


def ours(new, old, each, config):
    values = [torch.full((n,), a, dtype=torch.float64) for n, a in zip(LENGTHS, each, strict=True)]
    found = policy_loss(new, old, torch.cat(values), LENGTHS, config)
    weights = token_weights(LENGTHS, config.averaging, MOST, new)
    terms = sum(LENGTHS) if config.averaging == "dapo" else len(LENGTHS)
    return (found.per_token * weights).sum() / terms


def compare(found, expected, new):
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    (given,) = torch.autograd.grad(found, new, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, new)
    torch.testing.assert_close(given, wanted, atol=1e-12, rtol=1e-10)
    assert float(wanted.abs().max()) > 1e-3


@pytest.mark.parametrize("averaging", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("kind", ["group", "dr_grpo", "rloo"])
@pytest.mark.parametrize("high", [0.2, 0.28])
def test_grpo_rloo_and_the_averagings(averaging, kind, high):
    new, old = tensors()
    config = PolicyLossConfig(averaging=averaging, clip_high=high)
    each = advantages_of(kind)
    compare(ours(new, old, each, config), reference(new, old, each, averaging, 0.2, high), new)


def test_advantages_of_answers():
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    for kind, found in (
        ("group", group_relative(rewards, GROUP)),
        ("dr_grpo", group_relative(rewards, GROUP, "none")),
        ("rloo", leave_one_out(rewards, GROUP)),
    ):
        torch.testing.assert_close(found, torch.tensor(advantages_of(kind), dtype=torch.float64))


def test_gspo_clips_the_geometric_mean_of_an_answer():
    """Zheng et al. 2025, eq. 5-7: s_i = (π(y)/π_old(y))^(1/|y|), one term per answer."""
    new, old = tensors()
    config = PolicyLossConfig(ratio="sequence", averaging="grpo", clip_low=0.1, clip_high=0.1)
    each, terms = advantages_of("group"), []
    for log_new, log_old, a in zip(per_answer(new), per_answer(old), each, strict=True):
        s = torch.exp((log_new - log_old).sum() / len(log_new))
        terms.append(torch.min(s * a, torch.clamp(s, 0.9, 1.1) * a))
    compare(ours(new, old, each, config), -torch.stack(terms).mean(), new)


def test_cispo_clips_the_weight_and_keeps_the_gradient_of_every_token():
    """MiniMax 2025, eq. 4-5: J = E[sg(min(r, 1 + ε)) Â log π], over all tokens."""
    new, old = tensors()
    config = PolicyLossConfig(ratio="clipped_weight", averaging="dapo", clip_high=0.28)
    each, terms = advantages_of("group"), []
    for log_new, log_old, a in zip(per_answer(new), per_answer(old), each, strict=True):
        for t in range(len(log_new)):
            weight = min(float(torch.exp(log_new[t] - log_old[t]).detach()), 1.28)
            terms.append(weight * a * log_new[t])
    compare(ours(new, old, each, config), -torch.stack(terms).mean(), new)
    (gradient,) = torch.autograd.grad(ours(new, old, each, config), new)
    assert bool((gradient != 0).all())


def test_ppo_from_rewards_to_the_gradients_of_actor_and_critic():
    """Schulman et al. 2017, eq. 7, 9 and 11, with a KL penalty per token (Ouyang et al. 2022)."""
    new, old = tensors(scale=0.3)
    generator = torch.Generator().manual_seed(9)
    ref = old + 0.1 * torch.randn(sum(LENGTHS), generator=generator, dtype=torch.float64)
    old_values = torch.randn(sum(LENGTHS), generator=generator, dtype=torch.float64)
    values = (old_values + 0.4 * torch.randn(sum(LENGTHS), generator=generator)).requires_grad_()
    gamma, lam, beta = 0.98, 0.9, 0.1

    # the reference, token by token
    policy, critic = [], []
    for i, n in enumerate(LENGTHS):
        log_new, log_old, log_ref = (per_answer(x)[i] for x in (new, old, ref))
        before, now = per_answer(old_values)[i], per_answer(values)[i]
        rewards = [-beta * float(log_old[t] - log_ref[t]) for t in range(n)]
        rewards[-1] += REWARDS[i]
        after = [*before.tolist()[1:], 0.0]
        errors = [rewards[t] + gamma * after[t] - float(before[t]) for t in range(n)]
        for t in range(n):
            advantage = sum((gamma * lam) ** (s - t) * errors[s] for s in range(t, n))
            ratio = torch.exp(log_new[t] - log_old[t])
            policy.append(-torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
            target = advantage + float(before[t])
            limited = torch.clamp(now[t], float(before[t]) - 0.2, float(before[t]) + 0.2)
            critic.append(0.5 * torch.max((now[t] - target) ** 2, (limited - target) ** 2))

    # ours, on padded tensors
    widest = max(LENGTHS)
    mask = torch.arange(widest)[None] < torch.tensor(LENGTHS)[:, None]

    def padded(flat):
        return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, flat)

    rewards = padded(-beta * (old - ref))
    rewards[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1] += torch.tensor(
        REWARDS, dtype=torch.float64
    )
    held = torch.cat([padded(old_values), torch.zeros(len(LENGTHS), 1)], dim=1)
    advantages, returns = gae(rewards.detach(), held, mask, gamma=gamma, lam=lam)
    config = PolicyLossConfig(clip_high=0.2)
    found = policy_loss(new, old, advantages[mask], LENGTHS, config).per_token.mean()
    compare(found, torch.stack(policy).mean(), new)
    losses, _ = value_loss(values, old_values, returns[mask], clip=0.2)
    compare(losses.mean(), torch.stack(critic).mean(), values)
