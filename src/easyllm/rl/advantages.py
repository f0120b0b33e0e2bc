"""Advantages: how much better an answer, or a token of it, was than expected.

    GAE            A_t = Σ_l (γλ)^l δ_{t+l},  δ_t = r_t + γ V_{t+1} - V_t        per token, critic
    group          A_i = (R_i - mean(R_group)) / scale                           per answer
    leave-one-out  A_i = R_i - mean of the other answers of the group            per answer
    REINFORCE++    A_i = (R_i - mean(R_batch)) / std(R_batch)                    per answer

Sources: GAE, Schulman et al. 2015, arXiv 1506.02438, eq. 16; group-relative, Shao et al. 2024,
arXiv 2402.03300, section 4.1.2, and without the standard deviation Liu et al. 2025, arXiv
2503.20783, section 3.2; RLOO, Ahmadian et al. 2024, arXiv 2402.14740, eq. 8; REINFORCE++, Hu et al.
2025, arXiv 2501.03262, section 3.
"""

from typing import Literal

import torch
from torch import Tensor

GROUP_EPS = 1e-4
"""Added to a standard deviation of rewards, as other implementations of GRPO do."""
WHITEN_EPS = 1e-8
Scale = Literal["group", "batch", "none"]


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Returns generalised advantage estimates and returns.

    Args:
        rewards: [B, L], the reward after each token.
        values: [B, L+1], the critic's value before each token, and one after the last token, which
            bootstraps a truncated answer (0 after an answer that has ended). Values from the end of
            an answer on count as they are, so the caller sets those after the end to 0.
        mask: [B, L] bool, the tokens of each answer; they are contiguous, padding is on the right.
        gamma: discount γ.
        lam: λ; 1 gives Monte Carlo returns minus the values, 0 the one-step TD errors.

    Returns:
        Advantages [B, L] and returns (advantages + values) [B, L]; 0 outside the mask.
    """
    alive = mask.to(rewards.dtype)
    errors = (rewards + gamma * values[:, 1:] - values[:, :-1]) * alive
    carried = torch.zeros_like(rewards[:, 0])
    found = []
    for t in reversed(range(rewards.shape[1])):
        carried = errors[:, t] + gamma * lam * carried
        found.append(carried)
    advantages = torch.stack(found[::-1], dim=1) * alive
    return advantages, (advantages + values[:, :-1]) * alive


def group_relative(rewards: Tensor, group_size: int, scale: Scale = "group") -> Tensor:
    """Returns each answer's reward minus the mean of its group, divided by a scale.

    Args:
        rewards: [N], the answers of a prompt adjacent; N is a multiple of `group_size`.
        group_size: answers per prompt, at least 2.
        scale: the divisor: the sample standard deviation of the `group` or of the whole `batch`
            (plus 1e-4), or `none` (Dr. GRPO).

    Returns:
        [N]; 0 in a group of equal rewards.
    """
    assert group_size > 1, "the advantage of a group of one answer is 0; checked by the config"
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    # a group of equal rewards must give exactly 0, which the mean's rounding may not
    centred = centred.masked_fill((groups == groups[:, :1]).all(1, keepdim=True), 0.0)
    if scale == "group":
        centred = centred / (groups.std(1, keepdim=True) + GROUP_EPS)
    elif scale == "batch":
        centred = centred / (rewards.std() + GROUP_EPS)
    return centred.flatten()


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """Returns each reward [N] minus the mean reward of the other answers of its group (RLOO)."""
    assert group_size > 1, "an answer needs others to be compared with; checked by the config"
    groups = rewards.view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    equal = (groups == groups[:, :1]).all(1, keepdim=True)
    return (groups - others).masked_fill(equal, 0.0).flatten()


def reinforce_plus_plus(rewards: Tensor, group_size: int, *, baseline: bool = False) -> Tensor:
    """Returns the rewards [N] normalised over the whole batch.

    Args:
        rewards: [N].
        group_size: answers per prompt.
        baseline: whether the mean of the group is subtracted first (REINFORCE++-baseline), instead
            of that of the batch alone.
    """
    centred = rewards
    if baseline:
        groups = rewards.view(-1, group_size)
        centred = (groups - groups.mean(1, keepdim=True)).flatten()
    if len(rewards) < 2 or bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    return (centred - centred.mean()) / (centred.std() + WHITEN_EPS)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Returns values scaled to unit variance over the masked positions; 0 elsewhere.

    Args:
        values: any shape.
        mask: bool, the same shape.
        shift_mean: whether the mean becomes 0; False keeps it, as for rewards, whose sign matters.
    """
    chosen = values[mask]
    if chosen.numel() < 2:
        return values.masked_fill(~mask, 0.0)
    mean, variance = chosen.mean(), chosen.var()
    scaled = (values - mean) * torch.rsqrt(variance + WHITEN_EPS)
    if not shift_mean:
        scaled = scaled + mean
    return scaled.masked_fill(~mask, 0.0)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Returns 1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 a constant one.

    Args:
        values: [N], the critic's predictions.
        returns: [N]; with less than two or without variance, the result is 0.
    """
    if returns.numel() < 2 or float(returns.var()) == 0.0:
        return 0.0
    return 1.0 - float((returns - values).var() / returns.var())


__all__ = [
    "explained_variance",
    "gae",
    "group_relative",
    "leave_one_out",
    "reinforce_plus_plus",
    "whiten",
]
