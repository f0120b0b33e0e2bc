"""A reward that is optimised too far: proxy rises with KL, the gold reward peaks and falls."""

from itertools import pairwise
from typing import ClassVar

import numpy as np
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.evaluate.over_optimisation import over_optimisation
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"prompts": 60, "samples": 64}

    prompts: PositiveInt = Field(default=200, ge=20, le=1000, description="Number of prompts.")
    samples: PositiveInt = Field(default=256, ge=16, le=1024, description="Answers per prompt.")
    exploits: float = Field(
        default=0.02, ge=0, le=0.5, description="Share of answers that exploit the proxy."
    )
    bonus: float = Field(default=4.0, ge=0, le=20, description="What the proxy adds to those.")


def run(parameters: Parameters) -> Result:
    """Draws gold rewards and an imperfect proxy, and takes the best of n answers by the proxy."""
    random = np.random.default_rng(parameters.seed)
    shape = (parameters.prompts, parameters.samples)
    gold = random.normal(size=shape)
    exploit = random.random(shape) < parameters.exploits
    # answers that please the proxy without being good: what a learned reward model has not seen
    gold = np.where(exploit, gold - 1.0, gold)
    proxy = gold + random.normal(scale=0.5, size=shape) + parameters.bonus * exploit
    found = over_optimisation(proxy.tolist(), gold.tolist())
    points = found.points
    peak = max(points, key=lambda point: point.gold)
    rises = all(a.proxy < b.proxy for a, b in pairwise(points))
    last = points[-1]
    return Result(
        numbers=[
            number("peak_n", found.peak_n, "n with the highest gold reward", "真实奖励最高时的 n"),
            number("peak_kl", peak.kl_nats, "KL there, nats", "此时的 KL（nat）"),
            number("peak_gold", peak.gold, "gold reward there", "此时的真实奖励"),
            number("last_gold", last.gold, "gold reward at the end", "末端的真实奖励"),
            number("last_proxy", last.proxy, "proxy reward at the end", "末端的代理奖励"),
            number(
                "drop_errors",
                found.drop / found.drop_error if found.drop_error else 0.0,
                "fall of the gold reward, in standard errors",
                "真实奖励的下降（标准误的倍数）",
            ),
        ],
        figures=[
            Lines(
                title="Best of n by a proxy reward",
                x="KL from the model, nats",
                y="mean reward",
                lines={
                    "proxy (optimised)": [(p.kl_nats, p.proxy) for p in points],
                    "gold (wanted)": [(p.kl_nats, p.gold) for p in points],
                },
                marks=True,
            )
        ],
        claims=[
            claim(
                (
                    "Gao et al. (arXiv 2210.10760): as optimisation against a proxy moves a policy "
                    "away from its start in KL, the proxy reward keeps rising while the gold "
                    "reward rises and then falls.",
                    "Gao 等（arXiv 2210.10760）：针对代理奖励的优化使策略的 KL 不断增大，"
                    "代理奖励持续上升，真实奖励先升后降。",
                ),
                (
                    f"The gold reward peaks at {peak.gold:.2f} for n = {found.peak_n} and is "
                    f"{last.gold:.2f} at the end, where the proxy is at its highest, "
                    f"{last.proxy:.2f}.",
                    f"真实奖励在 n = {found.peak_n} 时达到最高 {peak.gold:.2f}，末端为 "
                    f"{last.gold:.2f}；代理奖励在末端最高，为 {last.proxy:.2f}。",
                ),
                "direction" if rises and found.over_optimised else "not",
                (
                    "The rewards are drawn, not learned: the shape is shown, not the paper's "
                    "coefficients.",
                    "奖励是随机生成而非学习得到的：只展示形状，不涉及论文的系数。",
                ),
            )
        ],
    )


LAB = Lab(
    name="over-optimisation",
    rows=(2,),
    chapter="survey",
    title=Text("A reward optimised too far", "过度优化的奖励"),
    seconds=4,
    parameters=Parameters,
    run=run,
)
