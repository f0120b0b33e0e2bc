"""What an evening trains: the sizes of its stages for the hours at hand, and how long they take.

    seconds of a training = FLOPs per token · tokens / (matmul rate · utilisation)

A training of a new model takes 6 N FLOPs a token (N: parameters). The plan is stored when an
evening begins: a run that was stopped continues with the same sizes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from easyllm.core.atomic import write_json
from easyllm.core.errors import DataError

PLAN_FILE = "plan.json"
USED = 0.8
"""Share of the hours that trainings are planned to take."""
SHARES = {"pretrain": 0.65, "sft": 0.12, "dpo": 0.05, "warm_start": 0.12, "grpo": 0.06}
"""Shares of the trainings' time; `warm_start` is the first part of the stage `grpo`."""
UTILISATION = 0.5
"""Share of the matmul rate that small models reach in training."""
TOKENS = {"sft": 1200, "dpo": 1500, "warm_start": 950, "grpo": 2400}
"""What a step costs, in tokens of pretraining: DPO has two answers and GRPO samples as well."""
MOST_STEPS = {"sft": 480, "dpo": 100, "warm_start": 1200, "grpo": 200}
"""Steps beyond which the small data sets are only learned by heart; pretraining gets the rest."""
VOCABULARY = 4096
DEPTHS = ((0.0, 3), (0.75, 4), (3.0, 6), (10.0, 8))
"""Layers of the model, by the fewest hours; the width is 64 times as many."""
FIXED = {"tokenizer": 10.0, "corpus": 20.0, "facts_before": 5.0, "facts_after": 5.0}
LAST = {"gptq": 15.0, "gguf": 5.0, "serve": 5.0}
"""Seconds of stages that hardly depend on the hours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EveningPlan:
    """The sizes of an evening.

    Attributes:
        hours: hours that it may take.
        depth: layers of the model.
        language: of the question that the served model is asked, `en` or `zh`.
        overrides: changes to the recipe `evening`.
        seconds: planned seconds of each stage.
        flops_per_s: the matmul rate that it was planned with.
    """

    hours: float
    depth: int
    language: str
    overrides: tuple[str, ...]
    seconds: Mapping[str, float]
    flops_per_s: float

    def save(self, folder: Path) -> None:
        """Writes the plan to a folder."""
        write_json(folder / PLAN_FILE, {"lab": "evening", **asdict(self)})


def load_plan(folder: Path) -> EveningPlan | None:
    """Returns the plan of an evening that has begun in a folder; None if none has.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / PLAN_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return EveningPlan(
            hours=values["hours"],
            depth=values["depth"],
            language=values["language"],
            overrides=tuple(values["overrides"]),
            seconds=dict(values["seconds"]),
            flops_per_s=values["flops_per_s"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the plan {str(path)!r} is damaged ({error}); remove the folder and start anew"
        ) from None


def plan_evening(hours: float, flops_per_s: float, *, language: str, seed: int) -> EveningPlan:
    """Returns the sizes for some hours.

    Args:
        hours: hours that the evening may take.
        flops_per_s: matmul rate of this machine.
        language: of the question that the served model is asked, `en` or `zh`.
        seed: seed of all stages.
    """
    depth = next(layers for least, layers in reversed(DEPTHS) if hours >= least)
    width = 64 * depth
    parameters = 12 * depth * width**2 + VOCABULARY * width
    rate = flops_per_s * UTILISATION / (6 * parameters)  # tokens per second
    budget = max(60.0, hours * 3600 * USED - sum(FIXED.values()) - sum(LAST.values()))
    wanted = {name: round(budget * SHARES[name] * rate / n) for name, n in TOKENS.items()}
    steps = {name: min(max(10, n), MOST_STEPS[name]) for name, n in wanted.items()}
    seconds = {name: n * TOKENS[name] / rate for name, n in steps.items()}
    seconds["pretrain"] = max(budget * SHARES["pretrain"], budget - sum(seconds.values()))
    seconds["grpo"] += seconds.pop("warm_start")
    tokens = round(seconds["pretrain"] * rate / 4096) * 4096
    warm_start = steps.pop("warm_start")
    overrides = (
        f"seed={seed}",
        f"stages.pretrain.model.depth={depth}",
        f"stages.pretrain.max_tokens={max(tokens, 40_960)}",
        *(f"stages.{name}.max_steps={n}" for name, n in steps.items()),
        f"stages.grpo.objective.warm_start.steps={warm_start}",
    )
    return EveningPlan(
        hours=hours,
        depth=depth,
        language=language,
        overrides=overrides,
        seconds={**FIXED, **seconds, **LAST},
        flops_per_s=flops_per_s,
    )


def quick_plan(*, language: str, seed: int) -> EveningPlan:
    """Returns the smallest evening, which shows that all stages work."""
    overrides = (
        f"seed={seed}",
        "stages.corpus.sources={text: {paths: [data/zh_text.jsonl]}}",
        "stages.tokenizer.vocab_size=512",
        "stages.pretrain.model.depth=1",
        "stages.pretrain.max_tokens=16384",
        "stages.pretrain.batch_tokens=2048",
        "stages.pretrain.data.eval_tokens=1024",
        *(f"stages.{name}.max_steps={n}" for name, n in (("sft", 3), ("dpo", 2), ("grpo", 2))),
        *(f"stages.{name}.batch_size=4" for name in ("sft", "dpo", "grpo")),
        "stages.sft.data.eval=[]",
        "stages.dpo.data.eval=[]",
        "stages.grpo.objective.rollout.group_size=2",
        "stages.grpo.objective.warm_start.steps=2",
        "stages.grpo.objective.warm_start.batch_size=8",
        "stages.grpo.data.held_out=4",
        "stages.facts_before.max_tokens=2",
        "stages.facts_after.max_tokens=2",
    )
    names = (*FIXED, "pretrain", "sft", "dpo", "grpo", *LAST)
    return EveningPlan(
        hours=0.0,
        depth=1,
        language=language,
        overrides=overrides,
        seconds=dict.fromkeys(names, 10.0),
        flops_per_s=0.0,
    )


__all__ = ["PLAN_FILE", "EveningPlan", "load_plan", "plan_evening", "quick_plan"]
