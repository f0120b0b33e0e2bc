"""Small models beyond their trained length: RoPE, interpolation, NTK, YaRN, ReRoPE, sinks."""

from statistics import mean
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.examples.sample import Sample
from easyllm.lab.lab import Claim, Lab, LabConfig, Lines, Number, Result, Text, claim, number
from easyllm.lab.small_models import (
    mean_loss,
    new_model,
    small_config,
    smoothed,
    standard_error,
    train_small,
)
from easyllm.models.context import ContextConfig, extend_context
from easyllm.nn.decoder import Decoder

VOCABULARY = 16


METHODS = ("RoPE", "interpolation", "NTK", "YaRN", "ReRoPE", "sinks and window")
ZH = {"sinks and window": "注意力汇与窗口", "interpolation": "位置内插"}
Losses = dict[tuple[str, int], list[float]]
"""Losses of the last part, by method and by length / trained length, one for each seed."""


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 6, "trained": 16, "texts": 2, "runs": 2}

    trained: PositiveInt = Field(default=32, ge=16, le=256, description="Trained length, tokens.")
    factor: Literal[2, 4, 8] = Field(default=8, description="Longest length of a test / trained.")
    steps: PositiveInt = Field(default=1200, le=20000, description="Training steps.")
    texts: PositiveInt = Field(default=24, le=500, description="Number of test texts.")
    runs: int = Field(default=3, ge=2, le=20, description="Trainings, by seed.")


def run(parameters: Parameters) -> Result:
    """Trains on repeated patterns of a random period, and measures the loss by length."""
    factors = [n for n in (1, 2, 4, 8) if n <= parameters.factor]
    losses: Losses = {(name, n): [] for name in METHODS for n in factors}
    curves = dict[str, list[tuple[float, float]]]()
    for seed in range(parameters.seed, parameters.seed + parameters.runs):
        generator = torch.Generator().manual_seed(seed)
        model, curves[f"seed {seed}"] = _trained(parameters, seed, generator)
        longest = parameters.trained * parameters.factor
        tests = [_repeated(longest, generator) for _ in range(parameters.texts)]
        for name, factor in losses:
            length = parameters.trained * factor
            extended = _with_context(model, _method(name, factor, parameters), length)
            losses[name, factor].append(_last_part(extended, tests, length, parameters.trained))
    return Result(
        numbers=_numbers(losses),
        figures=[
            Lines(
                title=f"Trained on {parameters.trained} tokens: loss in the last part of a text",
                x="length / trained length",
                y="loss, nats per token",
                lines={
                    name: [(float(n), mean(losses[name, n])) for n in factors] for name in METHODS
                },
                log_x=True,
                marks=True,
            ),
            Lines(title="Training", x="step", y="loss, nats per token", lines=curves),
        ],
        claims=[_claim(losses, factors)],
        series={f"{name}, {n}": values for (name, n), values in losses.items()},
    )


def _trained(
    parameters: Parameters, seed: int, generator: torch.Generator
) -> tuple[Decoder, list[tuple[float, float]]]:
    """Returns a model that was trained on texts of the trained length, and its losses."""
    length, steps = parameters.trained, parameters.steps
    config = small_config(vocab_size=VOCABULARY, layers=2, width=64).changed(max_seq_len=length)
    model = new_model(config, seed)
    samples = [_repeated(length, generator) for _ in range(16 * steps)]
    losses = train_small(model, samples, steps=steps, batch_size=16, seed=seed, warmup=20)
    return model, smoothed(losses)


def _method(name: str, factor: int, parameters: Parameters) -> ContextConfig | None:
    """Returns the change of positions for texts of `factor` times the trained length."""
    match name:
        case "RoPE":
            return None
        case "sinks and window":
            return ContextConfig(method="streaming", sinks=2)
        case "ReRoPE":
            return ContextConfig(method="rerope", factor=factor, window=parameters.trained // 2)
        case "interpolation":
            return ContextConfig(method="pi", factor=factor)
    return ContextConfig(method="ntk" if name == "NTK" else "yarn", factor=factor)


def _numbers(losses: Losses) -> list[Number]:
    return [
        number(
            f"{name.replace(' ', '_').lower()}_{factor}",
            mean(values),
            f"{name}, {factor} times the trained length: loss, nats",
            f"{ZH.get(name, name)}，训练长度的 {factor} 倍：损失（nat）",
        )
        for (name, factor), values in losses.items()
    ]


def _claim(losses: Losses, factors: list[int]) -> Claim:
    longest = factors[-1]
    orders = {n: _order(losses, n) for n in factors[1:]}
    gaps = {name: _gap(losses["RoPE", longest], losses[name, longest]) for name in METHODS[1:]}
    gains = [f"{name} {gap:.2f} ± {error:.2f}" for name, (gap, error) in gaps.items()]
    good = all(gap > 2 * error for gap, error in (gaps["NTK"], gaps["ReRoPE"]))
    better = mean(losses["ReRoPE", longest]) < mean(losses["NTK", longest])
    return claim(
        (
            "The article (spaces.ac.cn 9708): beyond the trained length RoPE fails "
            "(llama2-13b, 8k: loss 8.86), NTK repairs most of it (1.54), ReRoPE more (1.43).",
            "文章（spaces.ac.cn 9708）：超过训练长度后 RoPE 失效（llama2-13b，8k：损失 8.86），"
            "NTK 修复大部分（1.54），ReRoPE 更多（1.43）。",
        ),
        (
            "Best first: "
            + "; ".join(f"{n} times: {', '.join(order)}" for n, order in orders.items())
            + f". Loss below that of RoPE at {longest} times: {', '.join(gains)} (mean and "
            "standard error over seeds).",
            "由好到坏："
            + "；".join(
                f"{n} 倍：{'、'.join(ZH.get(name, name) for name in order)}"
                for n, order in orders.items()
            )
            + f"。{longest} 倍时比 RoPE 低："
            + "、".join(
                f"{ZH.get(name, name)} {gap:.2f} ± {error:.2f}"
                for name, (gap, error) in gaps.items()
            )
            + "（各种子的均值与标准误）。",
        ),
        "direction" if good and better else "not",
        (
            "A model of two layers on repeated patterns, not a 13B model on text: only the "
            "order is compared.",
            "两层的模型、重复的模式，而不是 13B 模型与文本：只比较次序。",
        ),
    )


def _order(losses: Losses, factor: int) -> list[str]:
    """Returns the methods at one length, the lowest loss first."""
    return sorted(METHODS, key=lambda name: mean(losses[name, factor]))


def _gap(a: list[float], b: list[float]) -> tuple[float, float]:
    """Returns the mean of a - b over the seeds, and its standard error."""
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    return mean(gaps), standard_error(gaps)


def _repeated(length: int, generator: torch.Generator) -> Sample:
    """Returns a random pattern of 5 to 9 tokens, repeated up to a length."""
    period = int(torch.randint(5, 10, (1,), generator=generator))
    pattern = torch.randint(VOCABULARY, (period,), generator=generator)
    ids = pattern.repeat(length // period + 1)[:length].tolist()
    return Sample.from_mask(ids)


def _with_context(model: Decoder, method: ContextConfig | None, longest: int) -> Decoder:
    """Returns a model with the same weights and other positions."""
    config = model.config
    config = config if method is None else extend_context(config, method)
    if method is None:
        config = config.changed(max_seq_len=longest)
    extended = Decoder(config)
    extended.load_state_dict(model.state_dict())
    return extended.eval()


def _last_part(model: Decoder, tests: list[Sample], length: int, part: int) -> float:
    """Returns the mean loss of the last `part` tokens of the first `length` tokens of texts.

    The first ten tokens of a text are left out, as its pattern is not known yet.
    """
    first = max(length - part, 10)
    masked = [
        Sample(
            test.token_ids[:length],
            tuple(label if i >= first else -100 for i, label in enumerate(test.labels[:length])),
        )
        for test in tests
    ]
    return mean_loss(model, masked)


LAB = Lab(
    name="extrapolation",
    rows=(14, 15, 34),
    chapter="positions",
    title=Text("Beyond the trained length", "超出训练长度"),
    seconds=240,
    parameters=Parameters,
    run=run,
)
