"""A whole evening: corpus, tokenizer, pretraining, SFT, DPO, GRPO, quantized files, a server."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from easyllm.core.errors import OutputError
from easyllm.core.json_types import JsonObject
from easyllm.core.progress import console, format_duration
from easyllm.lab.evening_plan import PLAN_FILE, EveningPlan, load_plan, plan_evening, quick_plan
from easyllm.lab.evening_stages import GGUF, Evening, run_stages
from easyllm.lab.lab import Bars, Claim, Lab, LabConfig, Lines, Number, Result, Text, claim, number
from easyllm.plan.machine import matmul_rate

LOSS, REWARD = "train/loss_nats", "eval/reward"
KEPT = 0.9
"""Share of the recalled facts that may be left after the last training to call them kept."""
NAMES = {
    "tokenizer": "分词器",
    "corpus": "语料",
    "pretrain": "预训练",
    "sft": "SFT",
    "dpo": "DPO",
    "grpo": "GRPO",
    "facts_before": "评测（之前）",
    "facts_after": "评测（之后）",
    "gptq": "GPTQ",
    "gguf": "GGUF",
    "serve": "服务",
}


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"smallest": True}

    hours: PositiveFloat = Field(
        default=1.0, ge=0.25, le=48, description="Hours that the evening may take."
    )
    language: Literal["en", "zh"] = Field(
        default="en", description="Language of the question that the served model is asked."
    )
    samples: PositiveInt = Field(default=32, le=512, description="GPTQ's calibration sequences.")
    smallest: bool = Field(default=False, description="Whether every stage is as small as it can.")


def run(parameters: Parameters, folder: Path) -> Result:
    """Plans the evening, runs the stages that are not done, and compares plan and clock."""
    plan = _plan(parameters, folder)
    total = sum(plan.seconds.values())
    console().print(
        f"planned: {format_duration(total)}, a model of {plan.depth} layers", markup=False
    )
    samples = 4 if parameters.smallest else parameters.samples
    evening = run_stages(plan, folder, samples=samples)
    taken = evening.seconds()
    return Result(
        numbers=[*_quality(evening), *_times(plan, taken)],
        figures=[_losses(evening), _rewards(evening), _clock(plan, taken)],
        claims=[_claim(parameters, plan, evening, taken), _gains(evening)],
        series={
            "planned_seconds": dict(plan.seconds),
            "seconds": taken,
            "question": evening.records["serve"]["question"],
            "answer": evening.records["serve"]["answer"],
        },
    )


def _plan(parameters: Parameters, folder: Path) -> EveningPlan:
    """Returns the plan of an evening that was stopped, or a new one, which is stored.

    Raises:
        OutputError: another evening has begun in the folder.
    """
    stored = load_plan(folder)
    plan = _planned(parameters, stored)
    if stored is None:
        folder.mkdir(parents=True, exist_ok=True)
        plan.save(folder)
        return plan
    if (plan.overrides, plan.language) != (stored.overrides, stored.language):
        raise OutputError(
            f"an evening with other parameters has begun in {str(folder)!r} "
            f"({stored.hours:g} hours); give the same ones, or another output=DIR"
        )
    return stored


def _planned(parameters: Parameters, stored: EveningPlan | None) -> EveningPlan:
    """Returns the plan for these parameters, with the rate that a stored one was planned with."""
    language, seed = parameters.language, parameters.seed
    if parameters.smallest:
        return quick_plan(language=language, seed=seed)
    # the smallest evening has no rate, and is refused in place of one with hours all the same
    rate = (stored.flops_per_s if stored is not None else 0.0) or matmul_rate()
    return plan_evening(parameters.hours, rate, language=language, seed=seed)


def _quality(evening: Evening) -> list[Number]:
    before, after = _recalled(evening)
    rewards = _points(evening.metrics["grpo"], REWARD)
    gptq, gguf, served = (evening.records[name] for name in ("gptq", "gguf", "serve"))
    found = [
        number(
            "pretrain_loss",
            _last(evening, "pretrain"),
            "pretraining: last loss, nats",
            "预训练：最后的损失，nats",
        ),
        number("sft_loss", _last(evening, "sft"), "SFT: last loss, nats", "SFT：最后的损失，nats"),
        number("facts_before", before, "facts recalled after SFT, share", "SFT 后记住的事实比例"),
        number("facts_after", after, "facts recalled after GRPO, share", "GRPO 后记住的事实比例"),
        number(
            "accuracy",
            _at_end(evening.metrics["dpo"], "eval/reward_accuracy"),
            "DPO: held-out pairs ordered rightly",
            "DPO：留出偏好对判断正确的比例",
        ),
        number(
            "reward_first",
            rewards[0][1],
            "held-out sums that are right before GRPO",
            "GRPO 之前答对的留出加法题比例",
        ),
        number(
            "reward_last",
            rewards[-1][1],
            "held-out sums that are right after GRPO",
            "GRPO 之后答对的留出加法题比例",
        ),
        number(
            "gptq_bytes",
            gptq["bytes"],
            "GPTQ, 4 bits: bytes of the weights",
            "GPTQ（4 位）：权重字节数",
        ),
        number(
            "gptq_perplexity",
            gptq["perplexity"] / gptq["original_perplexity"],
            "GPTQ: perplexity / original",
            "GPTQ：困惑度 / 原困惑度",
        ),
        number("gguf_bytes", gguf["bytes"], "GGUF, Q8_0: bytes", "GGUF（Q8_0）：字节数"),
        number(
            "tokens_per_s", served["tokens_per_s"], "served: tokens per second", "服务：每秒词元数"
        ),
        number("page_bytes", served["page_bytes"], "the chat page, bytes", "聊天页面，字节"),
    ]
    return found


def _times(plan: EveningPlan, taken: dict[str, float]) -> list[Number]:
    return [
        *(
            number(f"seconds_{name}", seconds, f"{name}: seconds", f"{NAMES[name]}：秒", 3)
            for name, seconds in taken.items()
        ),
        number(
            "planned", sum(plan.seconds.values()), "planned in total, seconds", "计划总时间，秒", 4
        ),
        number("taken", sum(taken.values()), "taken in total, seconds", "实际总时间，秒", 4),
    ]


def _losses(evening: Evening) -> Lines:
    return Lines(
        title="Loss of pretraining and SFT",
        x="step",
        y="nats per token",
        lines={name: _points(evening.metrics[name], LOSS) for name in ("pretrain", "sft")},
        log_x=True,
    )


def _rewards(evening: Evening) -> Lines:
    return Lines(
        title="Preferences and rewards",
        x="step",
        y="share",
        lines={
            "DPO: pairs ordered rightly": _points(evening.metrics["dpo"], "eval/reward_accuracy"),
            "GRPO: held-out sums that are right": _points(evening.metrics["grpo"], REWARD),
        },
        marks=True,
    )


def _clock(plan: EveningPlan, taken: dict[str, float]) -> Bars:
    return Bars(
        title="Planned and taken",
        x="stage",
        y="seconds",
        groups=list(taken),
        series={
            "planned": [plan.seconds.get(name, 0.0) for name in taken],
            "taken": list(taken.values()),
        },
        log_y=True,
    )


def _claim(
    parameters: Parameters, plan: EveningPlan, evening: Evening, taken: dict[str, float]
) -> Claim:
    planned, total = sum(plan.seconds.values()), sum(taken.values())
    served = evening.records["serve"]
    allowed = parameters.hours * 75 * 60
    return claim(
        (
            "A language model's whole life fits into an evening on a laptop: from text to a model "
            f"that is served as easyllm serve …/{GGUF}.",
            f"语言模型的一生可以在笔记本上一晚完成：从文本到用 easyllm serve …/{GGUF} 提供服务的"
            f"模型。",
        ),
        (
            f"Planned {format_duration(planned)}, taken {format_duration(total)}; asked "
            f"“{served['question']}”, the served model answers “{served['answer'].strip()}”.",
            f"计划 {format_duration(planned)}，实际 {format_duration(total)}；问"
            f"“{served['question']}”，"
            f"模型答“{served['answer'].strip()}”。",
        ),
        "reproduced" if total <= allowed else "direction",
        (
            "Seconds are those of each stage's last start; a stage that was stopped resumes.",
            "秒数为各阶段最后一次启动后的用时；中断的阶段会继续。",
        ),
    )


def _gains(evening: Evening) -> Claim:
    """What every training gained, and whether a later one destroyed it."""
    before, after = _recalled(evening)
    first, *_, last = [reward for _, reward in _points(evening.metrics["grpo"], REWARD)]
    ordered = _at_end(evening.metrics["dpo"], "eval/reward_accuracy") or 0.0
    return claim(
        (
            "Each training improves what it is for, and the next ones keep it.",
            "每一步训练都改进它的目标，后面的训练不丢掉它。",
        ),
        (
            f"After SFT {before:.0%} of the held-out facts are recalled; DPO orders {ordered:.0%} "
            f"of the held-out pairs rightly; GRPO raises right answers to held-out sums from "
            f"{first:.0%} to {last:.0%}; after it {after:.0%} of the facts are recalled.",
            f"SFT 后记住 {before:.0%} 的留出事实；DPO 后 {ordered:.0%} 的留出偏好对判断正确；"
            f"GRPO 使留出加法题的正确率从 {first:.0%} 到 {last:.0%}；之后记住 {after:.0%} 的事实。",
        ),
        "reproduced" if last > first and after >= KEPT * before > 0 else "not",
        (
            "The SFT data are learned again at the start of GRPO (warm_start.replay); without them "
            "all facts are forgotten.",
            "GRPO 开始时会复习 SFT 数据（warm_start.replay）；不复习则全部忘掉。",
        ),
    )


def _recalled(evening: Evening) -> tuple[float, float]:
    """Shares of the held-out facts that are recalled after SFT and at the end."""
    before, after = (
        evening.results[name].figures["facts"]["recall"] for name in ("facts_before", "facts_after")
    )
    return before, after


def _points(lines: Sequence[JsonObject], key: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[key])) for line in lines if key in line]


def _at_end(lines: Sequence[JsonObject], key: str) -> float | None:
    points = _points(lines, key)
    return points[-1][1] if points else None


def _last(evening: Evening, name: str) -> float | None:
    return _at_end(evening.metrics[name], LOSS)


LAB = Lab(
    name="evening",
    rows=(35, 36, 38, 40, 59, 69, 72),
    chapter="survey",
    title=Text("A model's whole life in one evening", "一晚上走完模型的一生"),
    seconds=3600,
    parameters=Parameters,
    run=run,
    repeatable=False,
    nightly=False,
    in_folder=True,
    marker=PLAN_FILE,
)
