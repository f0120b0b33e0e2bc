"""What `easyllm rl gridworld` shows: exact values, and how near the estimates come."""

from dataclasses import dataclass

import torch

from easyllm.core.json_types import JsonObject
from easyllm.rl.advantages import gae
from easyllm.rl.gridworld import MarkovDecisionProcess, build_gridworld
from easyllm.rl.values import (
    Episode,
    evaluate_policy,
    policy_iteration,
    sample_episode,
    td_lambda,
    value_iteration,
)


@dataclass(frozen=True, slots=True)
class GridworldReport:
    """The grids as lines of text, and the differences between estimates and exact values."""

    grids: dict[str, list[str]]
    errors: dict[str, float]

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return {"grids": dict(self.grids), "errors": dict(self.errors)}


def gridworld_report(
    *, slip: float = 0.2, discount: float = 0.95, episodes: int = 2000
) -> GridworldReport:
    """Solves the gridworld, and estimates the values of a random policy from episodes."""
    world = build_gridworld(slip=slip, discount=discount)
    process = world.process
    best, other = value_iteration(process), policy_iteration(process)
    policy = torch.full(process.transitions.shape[:2], 0.25, dtype=torch.float64)
    exact = evaluate_policy(process, policy)
    generator = torch.Generator().manual_seed(0)
    sampled = [sample_episode(process, policy, generator) for _ in range(episodes)]
    errors = {
        "value iteration against policy iteration": float((best.values - other.values).abs().max())
    }
    for lam in (0.0, 0.9):
        found = td_lambda(process, sampled, lam=lam)
        errors[f"TD({lam:g}) after {episodes} episodes, random policy"] = float(
            (found - exact).abs().max()
        )
    for lam in (0.0, 0.95, 1.0):
        errors[f"mean GAE(λ={lam:g}) of the first action against Q - V"] = _gae_error(
            process, sampled, exact, lam
        )
    return GridworldReport(
        {
            "values of the best policy": world.show_values(best.values),
            "best policy": world.show_policy(best.policy),
            "values of a random policy": world.show_values(exact),
        },
        errors,
    )


def _gae_error(
    process: MarkovDecisionProcess, sampled: list[Episode], exact: torch.Tensor, lam: float
) -> float:
    """Returns the largest difference of the mean advantage of a first action to Q - V."""
    found: dict[int, list[float]] = {}
    for episode in sampled:
        rewards = torch.tensor([episode.rewards], dtype=torch.float64)
        values = exact[torch.tensor([episode.states])]
        mask = torch.ones_like(rewards, dtype=torch.bool)
        advantages, _ = gae(rewards, values, mask, gamma=process.discount, lam=lam)
        found.setdefault(episode.actions[0], []).append(float(advantages[0, 0]))
    wanted = process.action_values(exact)[process.start] - exact[process.start]
    return max(abs(sum(a) / len(a) - float(wanted[action])) for action, a in found.items())


__all__ = ["GridworldReport", "gridworld_report"]
