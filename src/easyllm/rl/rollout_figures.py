"""Metrics of a rollout: rewards, lengths, truncation, and groups that teach nothing."""

from collections.abc import Sequence

import torch

from easyllm.rl.experience import Experience


def rollout_figures(experiences: Sequence[Experience]) -> dict[str, float]:
    """Returns the metrics of the answers of a rollout.

    Their names are those of `metrics.jsonl`: `rl/reward`, `rl/length_tokens`,
    `rl/truncated_share`, `rl/masked_share`, `rl/equal_groups_share`.
    """
    rewards = torch.tensor([each.score for each in experiences], dtype=torch.float64)
    lengths = torch.tensor([each.length for each in experiences], dtype=torch.float64)
    truncated = [each.answer.truncated for each in experiences]
    tokens = sum(each.length for each in experiences)
    masked = tokens - sum(each.sample().num_trained for each in experiences)
    return {
        "rl/reward": float(rewards.mean()),
        "rl/reward_std": float(rewards.std()) if len(rewards) > 1 else 0.0,
        "rl/length_tokens": float(lengths.mean()),
        "rl/length_max_tokens": float(lengths.max()),
        "rl/prompt_tokens": sum(len(e.prompt.token_ids) for e in experiences) / len(experiences),
        "rl/prompt_cut_share": sum(e.prompt.cut for e in experiences) / len(experiences),
        "rl/truncated_share": sum(truncated) / len(truncated),
        "rl/masked_share": masked / max(1, tokens),
        "rl/equal_groups_share": equal_groups_share(experiences),
        "rl/answers": float(len(experiences)),
    }


def equal_groups(experiences: Sequence[Experience]) -> set[int]:
    """Returns the groups of more than one answer whose rewards are all equal."""
    rewards: dict[int, list[float]] = {}
    for each in experiences:
        rewards.setdefault(each.group, []).append(each.reward)
    return {group for group, found in rewards.items() if len(found) > 1 and len(set(found)) == 1}


def equal_groups_share(experiences: Sequence[Experience]) -> float:
    """Returns the share of groups whose rewards are all equal."""
    return len(equal_groups(experiences)) / len({each.group for each in experiences})


__all__ = ["equal_groups", "equal_groups_share", "rollout_figures"]
