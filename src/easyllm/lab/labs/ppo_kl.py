"""PPO with and without a KL penalty, on a policy of one token with a proxy reward."""

from typing import ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.rl.advantages import whiten
from easyllm.rl.kl import kl_estimate
from easyllm.rl.policy_loss import PolicyLossConfig, policy_loss

CONFIG = PolicyLossConfig(clip_low=0.2, clip_high=0.2)
Curve = list[tuple[float, float]]


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"rollouts": 6}

    rollouts: PositiveInt = Field(default=150, le=5000, description="Rollouts of 256 tokens.")
    tokens: PositiveInt = Field(default=32, ge=4, le=1024, description="Tokens to choose from.")
    kl: NonNegativeFloat = Field(default=1.5, le=10, description="Coefficient of the penalty.")
    updates: PositiveInt = Field(default=4, le=32, description="Updates on each rollout.")


def run(parameters: Parameters) -> Result:
    """Trains the same policy twice, and follows reward, KL and entropy."""
    reward, gold, curves = dict[str, Curve](), dict[str, Curve](), dict[str, Curve]()
    last = {}
    for name, coefficient in (
        ("no penalty", 0.0),
        (f"KL penalty {parameters.kl:g}", parameters.kl),
    ):
        found = _train(parameters, coefficient)
        reward[f"proxy, {name}"] = [(s, p) for s, p, _, _ in found]
        gold[f"gold, {name}"] = [(s, g) for s, _, g, _ in found]
        curves[name] = [(s, k) for s, _, _, k in found]
        last[coefficient > 0] = found[-1]
    surrogate = _surrogate_at_one(parameters.seed)
    free, held = last[False], last[True]
    estimators = _estimators(parameters.seed)
    return Result(
        numbers=[
            number(
                "surrogate",
                surrogate,
                "|surrogate − mean advantage| at ratio 1",
                "比率为 1 时 |代理目标 − 平均优势|",
                2,
            ),
            number(
                "kl_free",
                free[3],
                "KL at the end without a penalty, nats",
                "无惩罚时末端的 KL（nat）",
            ),
            number("kl_held", held[3], "KL at the end with a penalty", "有惩罚时末端的 KL"),
            number(
                "gold_free",
                free[2],
                "gold reward at the end without a penalty",
                "无惩罚时末端的真实奖励",
            ),
            number(
                "gold_held",
                held[2],
                "gold reward at the end with a penalty",
                "有惩罚时末端的真实奖励",
            ),
            number(
                "proxy_free",
                free[1],
                "proxy reward at the end without a penalty",
                "无惩罚时末端的代理奖励",
            ),
            *(
                number(
                    f"spread_{name}",
                    value,
                    f"spread of the KL estimate {name}",
                    f"KL 估计 {name} 的标准差",
                )
                for name, value in estimators.items()
            ),
        ],
        figures=[
            Lines(
                title="Rewards",
                x="rollout",
                y="mean reward of the policy",
                lines={**reward, **gold},
            ),
            Lines(title="Distance from the reference", x="rollout", y="KL, nats", lines=curves),
        ],
        claims=[
            claim(
                (
                    "PPO-max (article zhihu 666455333, MOSS-RLHF): a penalty on the KL per token "
                    "keeps the policy near the reference; KL, not the reward, shows whether "
                    "training is healthy.",
                    "PPO-max（文章：知乎 666455333，MOSS-RLHF）：逐词元的 KL 惩罚使策略保持在"
                    "参考模型附近；判断训练是否健康要看 KL，而不是奖励。",
                ),
                (
                    f"Without the penalty the KL is {free[3]:.2f} nats, the proxy {free[1]:.2f} "
                    f"and the gold reward {free[2]:.2f}; with it {held[3]:.2f}, {held[1]:.2f} and "
                    f"{held[2]:.2f}.",
                    f"无惩罚时 KL 为 {free[3]:.2f} nat，代理奖励 {free[1]:.2f}，真实奖励 "
                    f"{free[2]:.2f}；有惩罚时为 {held[3]:.2f}、{held[1]:.2f}、{held[2]:.2f}。",
                ),
                "direction" if held[3] < free[3] and held[2] > free[2] else "not",
                ("A policy of one token, not a language model.", "单词元的策略，而不是语言模型。"),
            )
        ],
    )


def _train(parameters: Parameters, coefficient: float) -> list[tuple[float, float, float, float]]:
    """Returns rollout, proxy, gold and KL of the policy after each rollout, all exact."""
    generator = torch.Generator().manual_seed(parameters.seed)
    size = parameters.tokens
    gold = torch.randn(size, generator=generator)
    reference = torch.log_softmax(torch.randn(size, generator=generator), 0)
    proxy = gold.clone()
    exploited = int(gold.argmin())
    proxy[exploited] = float(gold.max()) + 2.0  # the worst token pleases the proxy most
    logits = reference.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    found = []
    for rollout in range(parameters.rollouts):
        with torch.no_grad():
            old = torch.log_softmax(logits, 0)
            tokens = torch.multinomial(old.exp(), 256, replacement=True, generator=generator)
            k1 = kl_estimate(old[tokens], reference[tokens], "k1")
            rewards = proxy[tokens] - coefficient * k1
            advantages = whiten(rewards, torch.ones_like(rewards, dtype=torch.bool))
        for _ in range(parameters.updates):
            current = torch.log_softmax(logits, 0)[tokens]
            loss = policy_loss(current, old[tokens], advantages, [1] * 256, CONFIG)
            optimizer.zero_grad()
            loss.per_token.mean().backward()
            optimizer.step()
        with torch.no_grad():
            after = torch.log_softmax(logits, 0)
            p = after.exp()
            kl = float((p * (after - reference)).sum())
            found.append((float(rollout + 1), float(p @ proxy), float(p @ gold), kl))
    return found


def _surrogate_at_one(seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    logprobs, advantages = torch.randn(2, 64, generator=generator, dtype=torch.float64)
    loss = policy_loss(logprobs, logprobs, advantages, [64], CONFIG)
    return abs(float(loss.per_token.mean() + advantages.mean()))


def _estimators(seed: int) -> dict[str, float]:
    """Returns the standard deviation of each estimate of a small KL."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(64, generator=generator, dtype=torch.float64)
    moved = base + 0.2 * torch.randn(64, generator=generator, dtype=torch.float64)
    p, q = torch.log_softmax(moved, 0), torch.log_softmax(base, 0)
    tokens = torch.multinomial(p.exp(), 4096, replacement=True, generator=generator)
    return {
        name: float(kl_estimate(p[tokens], q[tokens], name).std()) for name in ("k1", "k2", "k3")
    }


LAB = Lab(
    name="ppo-kl",
    rows=(39,),
    chapter="training",
    title=Text("PPO with and without a KL penalty", "有无 KL 惩罚的 PPO"),
    seconds=5,
    parameters=Parameters,
    run=run,
)
