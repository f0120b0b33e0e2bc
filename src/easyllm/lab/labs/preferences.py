"""A reward model and DPO on the same synthetic preferences: ln 2 at the start, then margins."""

import copy
import math
from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from easyllm.batches.packing import pack
from easyllm.core.json_types import JsonObject
from easyllm.examples.prepare import Encoded
from easyllm.examples.rankings import EncodedRanking
from easyllm.examples.sample import SampleGroup
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.small_models import new_model, small_config, train_small
from easyllm.nn.decoder import Decoder
from easyllm.train.objectives import Objective
from easyllm.train.objectives.dpo import DPO, DPOConfig
from easyllm.train.objectives.objective import Reference
from easyllm.train.objectives.pairs import group_of
from easyllm.train.objectives.reward import Reward, read_at_end

GOOD = 8
"""Tokens below this number are liked: the better of two responses has more of them."""


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 3, "pairs": 32}

    pairs: PositiveInt = Field(default=512, ge=16, le=10000, description="Training pairs.")
    steps: PositiveInt = Field(default=80, le=2000, description="Training steps.")
    beta: PositiveFloat = Field(default=0.1, le=10, description="β of DPO.")
    learning_rate: PositiveFloat = Field(default=1e-3, le=1, description="Learning rate.")


def run(parameters: Parameters) -> Result:
    """Trains a reward model and a DPO policy on pairs whose better response is known."""
    generator = torch.Generator().manual_seed(parameters.seed)
    encoded = [_pair(generator) for _ in range(parameters.pairs + 64)]
    curves, first, last = {}, {}, {}
    for name in ("reward model", "DPO"):
        whole = name == "reward model"
        groups = [
            group_of(r, [read_at_end(e) if whole else e.sample() for e in r.sequences])
            for r in encoded
        ]
        held_out, pairs = groups[:64], groups[64:]
        model = new_model(small_config(vocab_size=32, width=32), parameters.seed)
        objective: Objective = Reward() if whole else DPO(DPOConfig(beta=parameters.beta))
        if whole:
            model = objective.prepare_model(model, seed=parameters.seed).requires_grad_(True)
            assert model.score is not None, "prepare_model adds it"
            torch.nn.init.zeros_(model.score.weight)
        else:
            frozen = copy.deepcopy(model).requires_grad_(False).eval()
            objective.reference = Reference(frozen, without_adapter=False)
        first[name] = _evaluate(model, objective, held_out)
        curve = [(0.0, first[name]["reward_accuracy"])]

        def measure(
            step: int,
            _: float,
            model: Decoder = model,
            curve: list[tuple[float, float]] = curve,
            objective: Objective = objective,
            held: list[SampleGroup] = held_out,
        ) -> None:
            if step % max(1, parameters.steps // 20) == 0:
                found = _evaluate(model, objective, held)
                curve.append((float(step), found["reward_accuracy"]))

        train_small(
            model,
            pairs,
            steps=parameters.steps,
            batch_size=16,
            objective=objective,
            learning_rate=parameters.learning_rate,
            seed=parameters.seed,
            after_step=measure,
        )
        last[name] = _evaluate(model, objective, held_out)
        curves[name] = curve
    start = {name: first[name]["loss_nats"] for name in first}
    exact = all(abs(loss - math.log(2)) < 1e-5 for loss in start.values())
    good = last["reward model"]["reward_accuracy"] > 0.9 and last["DPO"]["reward_margin"] > 0
    return Result(
        numbers=[
            number(
                "rm_first",
                start["reward model"],
                "first loss, reward model (ln 2 = 0.6931)",
                "初始损失，奖励模型（ln 2 = 0.6931）",
                5,
            ),
            number("dpo_first", start["DPO"], "first loss, DPO", "初始损失，DPO", 5),
            number(
                "rm_accuracy",
                last["reward model"]["reward_accuracy"],
                "held-out accuracy of the reward model",
                "奖励模型的留出集准确率",
            ),
            number(
                "dpo_accuracy",
                last["DPO"]["reward_accuracy"],
                "held-out accuracy of DPO's implicit rewards",
                "DPO 隐式奖励的留出集准确率",
            ),
            number(
                "dpo_margin",
                last["DPO"]["reward_margin"],
                "margin of the implicit rewards",
                "隐式奖励的间隔",
            ),
        ],
        figures=[
            Lines(
                title="Held-out pairs in the right order",
                x="step",
                y="share of pairs",
                lines=curves,
                marks=True,
            )
        ],
        claims=[
            claim(
                (
                    "A reward model trained by −log σ(r_w − r_l) starts at ln 2 with a zero head; "
                    "DPO (arXiv 2305.18290) starts at ln 2, because policy and reference agree, "
                    "and widens the margin of its implicit rewards.",
                    "以 −log σ(r_w − r_l) 训练的奖励模型，头为零时损失为 ln 2；"
                    "DPO（arXiv 2305.18290）因策略等于参考模型也从 ln 2 开始，"
                    "并拉大隐式奖励的间隔。",
                ),
                (
                    f"Both start at {start['DPO']:.4f}; after {parameters.steps} steps the reward "
                    f"model orders {last['reward model']['reward_accuracy']:.0%} of held-out pairs "
                    f"rightly, DPO {last['DPO']['reward_accuracy']:.0%} with a margin of "
                    f"{last['DPO']['reward_margin']:.2f}.",
                    f"两者都从 {start['DPO']:.4f} 开始；{parameters.steps} 步后奖励模型在留出集上"
                    f"正确排序 {last['reward model']['reward_accuracy']:.0%}，DPO 为 "
                    f"{last['DPO']['reward_accuracy']:.0%}，间隔 "
                    f"{last['DPO']['reward_margin']:.2f}。",
                ),
                "reproduced" if exact and good else ("direction" if exact else "not"),
            )
        ],
    )


def _pair(generator: torch.Generator) -> EncodedRanking:
    """Returns a prompt with two responses; the better one has more liked tokens."""
    prompt = torch.randint(32, (4,), generator=generator).tolist()
    responses = []
    for share in (0.7, 0.2):
        liked = torch.rand(8, generator=generator) < share
        low = torch.randint(GOOD, (8,), generator=generator)
        high = torch.randint(GOOD, 32, (8,), generator=generator)
        responses.append(torch.where(liked, low, high).tolist())
    responses.sort(key=lambda ids: -sum(i < GOOD for i in ids))
    encoded = [Encoded("pair", [*prompt, *ids], [False] * 4 + [True] * 8) for ids in responses]
    return EncodedRanking(tuple(encoded), (0, 1), len(prompt))


def _evaluate(model: Decoder, objective: Objective, groups: list[SampleGroup]) -> dict[str, float]:
    with torch.no_grad():
        found = objective.evaluate(model, [pack(groups)])
    model.train()
    return found


LAB = Lab(
    name="preferences",
    rows=(38, 40),
    chapter="training",
    title=Text("A reward model and DPO on the same pairs", "同一批偏好上的奖励模型与 DPO"),
    seconds=20,
    parameters=Parameters,
    run=run,
)
