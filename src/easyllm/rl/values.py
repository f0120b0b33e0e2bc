"""Exact and estimated values of a finite decision process, the reference of `rl/advantages`.

    value iteration    V ← max_a [ r(s, a) + γ Σ p(s'|s, a) V(s') ]
    policy iteration   V ← (I - γ P_π)⁻¹ r_π,   π ← argmax_a Q(s, a)
    TD(λ)              δ = r + γ V(s') - V(s),  e ← γ λ e + 1_s,  V ← V + α δ e

Sutton & Barto 2018, Reinforcement Learning, sections 4.3, 4.4, 6.1 and 12.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyllm.rl.gridworld import MarkovDecisionProcess

MAX_SWEEPS = 100_000
MAX_STEPS = 10_000
"""Maximum length of a sampled episode."""


@dataclass(frozen=True, slots=True)
class Solution:
    """The values and the greedy policy of a decision process.

    Attributes:
        values: [S] fp64.
        policy: [S] int64, the best action of each state.
        iterations: number of sweeps over all states, or of policy improvements.
    """

    values: Tensor
    policy: Tensor
    iterations: int


@dataclass(frozen=True, slots=True)
class Episode:
    """A sampled episode of T steps.

    Attributes:
        states: T+1 states, the last one terminal unless the episode was truncated.
        actions: T actions.
        rewards: T rewards.
        truncated: whether the episode ended before a terminal state.
    """

    states: list[int]
    actions: list[int]
    rewards: list[float]
    truncated: bool


def value_iteration(process: MarkovDecisionProcess, *, tolerance: float = 1e-12) -> Solution:
    """Solves a decision process by value iteration.

    Args:
        process: the decision process.
        tolerance: the iteration ends when no value changes by more than this.
    """
    values, change, sweeps = torch.zeros(process.num_states, dtype=torch.float64), math.inf, 0
    while change > tolerance and sweeps < MAX_SWEEPS:
        new = process.action_values(values).amax(1)
        change, values, sweeps = float((new - values).abs().max()), new, sweeps + 1
    return Solution(values, process.action_values(values).argmax(1), sweeps)


def policy_iteration(process: MarkovDecisionProcess) -> Solution:
    """Solves a decision process by policy iteration, with exact policy evaluation."""
    policy, iterations = torch.zeros(process.num_states, dtype=torch.int64), 0
    while True:
        iterations += 1
        values = evaluate_policy(process, one_hot_policy(process, policy))
        q = process.action_values(values)
        kept = q.gather(1, policy[:, None]).squeeze(1)
        better = q.amax(1) > kept + 1e-12  # an equally good action does not replace another
        if not bool(better.any()):
            return Solution(values, policy, iterations)
        policy = torch.where(better, q.argmax(1), policy)


def one_hot_policy(process: MarkovDecisionProcess, policy: Tensor) -> Tensor:
    """Returns the probabilities [S, A] of a deterministic policy [S]."""
    shape = process.transitions.shape[:2]
    return torch.zeros(shape, dtype=torch.float64).scatter_(1, policy[:, None], 1.0)


def evaluate_policy(process: MarkovDecisionProcess, probabilities: Tensor) -> Tensor:
    """Returns the exact values [S] of a stochastic policy, by solving Bellman's linear equations.

    Args:
        process: the decision process.
        probabilities: [S, A], the policy.
    """
    alive = (~process.terminal).double()
    step = torch.einsum("sa,sat->st", probabilities, process.transitions) * alive[:, None]
    reward = (probabilities * process.expected_rewards()).sum(1) * alive
    system = torch.eye(process.num_states, dtype=torch.float64) - process.discount * step
    values: Tensor = torch.linalg.solve(system, reward)
    return values


def sample_episode(
    process: MarkovDecisionProcess,
    probabilities: Tensor,
    generator: torch.Generator,
    *,
    max_steps: int = MAX_STEPS,
) -> Episode:
    """Samples an episode of a policy [S, A] from the start state."""
    state, states = process.start, [process.start]
    actions: list[int] = []
    rewards: list[float] = []
    while not process.terminal[state] and len(actions) < max_steps:
        action = int(torch.multinomial(probabilities[state], 1, generator=generator))
        reached = process.transitions[state, action]
        following = int(torch.multinomial(reached, 1, generator=generator))
        rewards.append(float(process.rewards[state, action, following]))
        actions.append(action)
        states.append(following)
        state = following
    return Episode(states, actions, rewards, truncated=not bool(process.terminal[state]))


def td_lambda(
    process: MarkovDecisionProcess,
    episodes: Sequence[Episode],
    *,
    lam: float = 0.0,
    learning_rate: float = 0.1,
    decay: float = 100.0,
) -> Tensor:
    """Estimates the values [S] of the policy that sampled the episodes, by TD(λ).

    Args:
        process: the decision process, of which only S, γ and the terminal states are used.
        episodes: sampled episodes, used once each in order.
        lam: λ; 0 is TD(0), 1 is every-visit Monte Carlo with online updates.
        learning_rate: α of the first episode; episode i has α / (1 + i / decay).
        decay: see `learning_rate`.
    """
    values = torch.zeros(process.num_states, dtype=torch.float64)
    for number, episode in enumerate(episodes):
        rate = learning_rate / (1 + number / decay)
        traces = torch.zeros_like(values)
        for state, following, reward in zip(
            episode.states, episode.states[1:], episode.rewards, strict=False
        ):
            error = reward + process.discount * values[following] - values[state]
            traces *= process.discount * lam
            traces[state] += 1
            values = values + rate * error * traces
            values[process.terminal] = 0.0
    return values


__all__ = [
    "Episode",
    "Solution",
    "evaluate_policy",
    "one_hot_policy",
    "policy_iteration",
    "sample_episode",
    "td_lambda",
    "value_iteration",
]
