"""A gridworld with known values: dynamic programming, TD and GAE against the truth."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Grid, Lab, LabConfig, Lines, Result, Text, claim, number
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

LAMBDAS = (0.0, 0.5, 0.8, 0.9, 0.95, 1.0)


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"episodes": 40}

    episodes: PositiveInt = Field(default=600, ge=20, le=20000, description="Sampled episodes.")
    slip: float = Field(default=0.2, ge=0, lt=1, description="Probability of a wrong move.")
    discount: float = Field(default=0.95, gt=0, lt=1, description="Discount γ.")
    error: float = Field(default=0.3, ge=0, le=5, description="Error of the critic's values.")


def run(parameters: Parameters) -> Result:
    """Solves the gridworld, and measures bias and spread of GAE with an imperfect critic."""
    world = build_gridworld(slip=parameters.slip, discount=parameters.discount)
    process = world.process
    best, other = value_iteration(process), policy_iteration(process)
    apart = float((best.values - other.values).abs().max())
    residual = float(
        (process.action_values(best.values).amax(1) - best.values)[~process.terminal].abs().max()
    )
    policy = torch.full(process.transitions.shape[:2], 0.25, dtype=torch.float64)
    exact = evaluate_policy(process, policy)
    generator = torch.Generator().manual_seed(parameters.seed)
    episodes = [sample_episode(process, policy, generator) for _ in range(parameters.episodes)]
    counts = [n for n in (10, 20, 50, 100, 200, 400, 600, 1000) if n <= parameters.episodes]
    learned = {
        f"TD({lam:g})": [
            (
                float(n),
                float((td_lambda(process, episodes[:n], lam=lam) - exact).square().mean().sqrt()),
            )
            for n in counts
        ]
        for lam in (0.0, 0.9)
    }
    noise = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    critic = exact + parameters.error * noise * ~process.terminal
    first = {lam: _first_advantages(process, episodes, critic, lam) for lam in LAMBDAS}
    wanted = process.action_values(exact)[process.start] - exact[process.start]
    bias, spread = {}, {}
    for lam, (actions, values) in first.items():
        errors = values + critic[process.start] - exact[process.start] - wanted[actions]
        bias[lam], spread[lam] = float(errors.mean().abs()), float(errors.std())
    lam1, lam0 = _definitions(process, episodes, critic)
    return Result(
        numbers=[
            number(
                "iterations", best.iterations, "sweeps of value iteration", "价值迭代的扫描次数"
            ),
            number("apart", apart, "value against policy iteration", "价值迭代与策略迭代之差", 2),
            number("residual", residual, "residual of Bellman's equation", "贝尔曼方程的残差", 2),
            number(
                "gae_mc",
                lam1,
                "GAE(1) against Monte Carlo returns less values",
                "GAE(1) 与蒙特卡洛回报减价值之差",
                2,
            ),
            number("gae_td", lam0, "GAE(0) against TD errors", "GAE(0) 与 TD 误差之差", 2),
            number("spread_0", spread[0.0], "spread of GAE(0)", "GAE(0) 的标准差"),
            number("spread_1", spread[1.0], "spread of GAE(1)", "GAE(1) 的标准差"),
            number(
                "bias_0",
                bias[0.0],
                "bias of GAE(0) with a wrong critic",
                "评论家有误时 GAE(0) 的偏差",
            ),
            number("bias_1", bias[1.0], "bias of GAE(1)", "GAE(1) 的偏差"),
        ],
        figures=[
            Grid(
                title="Values of the best policy",
                x="column",
                y="row",
                values=_grid(world.rows, world.states, best.values),
            ),
            Lines(
                title="Learned values of a random policy",
                x="episodes",
                y="root mean square error",
                lines=learned,
                log_x=True,
                marks=True,
            ),
            Lines(
                title="GAE with a wrong critic, first action",
                x="λ",
                y="reward",
                lines={"bias": list(bias.items()), "standard deviation": list(spread.items())},
                marks=True,
            ),
        ],
        claims=[
            claim(
                (
                    "GAE (arXiv 1506.02438, section 3): λ = 0 is the TD error, biased by the "
                    "critic, with little variance; λ = 1 is the Monte Carlo return less the "
                    "value, without that bias and with more variance.",
                    "GAE（arXiv 1506.02438，第 3 节）：λ = 0 为 TD 误差，有评论家带来的偏差、"
                    "方差小；"
                    "λ = 1 为蒙特卡洛回报减价值，没有这种偏差、方差更大。",
                ),
                (
                    f"Both ends are equal to their definitions ({max(lam0, lam1):.0e}); from λ = 0 "
                    f"to 1 the bias goes from {bias[0.0]:.3f} to {bias[1.0]:.3f}, the spread from "
                    f"{spread[0.0]:.2f} to {spread[1.0]:.2f}.",
                    f"两端与定义相等（{max(lam0, lam1):.0e}）；λ 从 0 到 1，偏差由 "
                    f"{bias[0.0]:.3f} 到 "
                    f"{bias[1.0]:.3f}，标准差由 {spread[0.0]:.2f} 到 {spread[1.0]:.2f}。",
                ),
                "reproduced"
                if max(lam0, lam1) < 1e-9 and spread[0.0] < spread[1.0] and bias[0.0] > bias[1.0]
                else "not",
            )
        ],
    )


def _advantages(
    process: MarkovDecisionProcess, episode: Episode, critic: Tensor, lam: float
) -> Tensor:
    rewards = torch.tensor([episode.rewards], dtype=torch.float64)
    values = critic[torch.tensor([episode.states])]  # [1, T + 1]
    mask = torch.ones_like(rewards, dtype=torch.bool)
    return gae(rewards, values, mask, gamma=process.discount, lam=lam)[0][0]


def _first_advantages(
    process: MarkovDecisionProcess, episodes: list[Episode], critic: Tensor, lam: float
) -> tuple[Tensor, Tensor]:
    whole = [e for e in episodes if not e.truncated]
    found = [_advantages(process, e, critic, lam)[0] for e in whole]
    return torch.tensor([e.actions[0] for e in whole]), torch.stack(found)


def _definitions(
    process: MarkovDecisionProcess, episodes: list[Episode], critic: Tensor
) -> tuple[float, float]:
    """Returns the largest differences of GAE(1) and GAE(0) from their definitions."""
    one, zero = 0.0, 0.0
    for episode in [e for e in episodes if not e.truncated][:20]:
        values = critic[torch.tensor(episode.states)]
        returns, total = list[float](), 0.0
        for reward in reversed(episode.rewards):
            total = reward + process.discount * total
            returns.insert(0, total)
        rewards = torch.tensor(episode.rewards, dtype=torch.float64)
        errors = rewards + process.discount * values[1:] - values[:-1]
        mc = _advantages(process, episode, critic, 1.0)
        wanted = torch.tensor(returns, dtype=torch.float64) - values[:-1]
        one = max(one, float((mc - wanted).abs().max()))
        td = _advantages(process, episode, critic, 0.0)
        zero = max(zero, float((td - errors).abs().max()))
    return one, zero


def _grid(
    rows: tuple[str, ...], states: dict[tuple[int, int], int], values: Tensor
) -> list[list[float]]:
    return [
        [float(values[states[r, c]]) if (r, c) in states else 0.0 for c in range(len(row))]
        for r, row in enumerate(rows)
    ]


LAB = Lab(
    name="gridworld",
    rows=(37,),
    chapter="training",
    title=Text("Reinforcement learning where the truth is known", "真值已知的强化学习"),
    seconds=10,
    parameters=Parameters,
    run=run,
)
