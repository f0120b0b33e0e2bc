"""LoRA+: a higher rate for the matrix that starts at zero."""

import copy
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.adapters import attach
from easyllm.adapters.lora import LoRAConfig
from easyllm.core.json_types import JsonObject
from easyllm.examples.sample import Sample
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.small_models import mean_loss, new_model, small_config, token_chains, train_small
from easyllm.nn.decoder import Decoder

RATES = (1e-3, 3e-3, 1e-2, 3e-2)


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 2, "base_steps": 2, "width": 32}

    width: PositiveInt = Field(default=128, multiple_of=16, le=1024, description="Model width.")
    rank: PositiveInt = Field(default=4, le=16, description="Rank of the adapter.")
    ratio: float = Field(default=16.0, ge=1, le=64, description="λ, rate of B / rate of A.")
    base_steps: PositiveInt = Field(default=40, le=2000, description="Steps of the base model.")
    steps: PositiveInt = Field(default=30, le=2000, description="Steps of each run.")


def run(parameters: Parameters) -> Result:
    """Trains LoRA at several rates, with λ = 1 and with a higher λ."""
    generator = torch.Generator().manual_seed(parameters.seed)
    base = new_model(small_config(vocab_size=32, width=parameters.width), parameters.seed)
    old = token_chains(generator, 8 * parameters.base_steps)
    new = token_chains(generator, 8 * parameters.steps + 24)
    held_out, new = new[:24], new[24:]
    train_small(base, old, steps=parameters.base_steps, batch_size=8, seed=parameters.seed)
    curves = {}
    for ratio in (1.0, parameters.ratio):
        curves[f"λ = {ratio:g}"] = [
            (rate, _adapted_loss(base, new, held_out, parameters, rate / ratio**0.5, ratio))
            for rate in RATES
        ]
    best = {name: min(loss for _, loss in points) for name, points in curves.items()}
    plain, plus = best.values()
    blog = {n: (n / 8) ** 0.5 for n in (768, 4096)}
    return Result(
        numbers=[
            number(
                "start",
                mean_loss(base, held_out),
                "loss on the new data before",
                "适配前在新数据上的损失",
            ),
            number("best_1", plain, "best loss with λ = 1", "λ = 1 的最低损失"),
            number(
                "best_plus",
                plus,
                f"best loss with λ = {parameters.ratio:g}",
                f"λ = {parameters.ratio:g} 的最低损失",
            ),
            *(
                number(
                    f"blog_{n}", value, f"√(n/r) for n = {n}, r = 8", f"n = {n}、r = 8 时的 √(n/r)"
                )
                for n, value in blog.items()
            ),
        ],
        figures=[
            Lines(
                title=f"LoRA of rank {parameters.rank}, width {parameters.width}",
                x="√(rate of A × rate of B)",
                y="held-out loss, nats",
                lines=curves,
                log_x=True,
                marks=True,
            )
        ],
        claims=[
            claim(
                (
                    "The article (kexue.fm 10001): with a rate for B above that for A (λ = 16) "
                    "LoRA gets better; its estimate of the ratio is of the order √(n/r).",
                    "文章（kexue.fm 10001）：B 的学习率高于 A（λ = 16）时 LoRA 更好；"
                    "其估计的比率为 √(n/r) 量级。",
                ),
                (
                    f"Best of {len(RATES)} rates each: {plain:.3f} with λ = 1, {plus:.3f} with "
                    f"λ = {parameters.ratio:g}.",
                    f"各取 {len(RATES)} 个学习率中最好的：λ = 1 为 {plain:.3f}，"
                    f"λ = {parameters.ratio:g} 为 {plus:.3f}。",
                ),
                "direction" if plus < plain else "not",
                (
                    "A small model: the gain is expected at large widths.",
                    "小模型：预期增益出现在大宽度时。",
                ),
            )
        ],
    )


def _adapted_loss(
    base: Decoder,
    samples: list[Sample],
    held_out: list[Sample],
    parameters: Parameters,
    rate: float,
    ratio: float,
) -> float:
    model = copy.deepcopy(base)
    config = LoRAConfig(rank=parameters.rank, alpha=2.0 * parameters.rank, rate_ratio=ratio)
    adapters = attach(model, config, seed=parameters.seed)
    train_small(
        model,
        samples,
        steps=parameters.steps,
        batch_size=8,
        learning_rate=rate,
        adapters=adapters,
        seed=parameters.seed,
    )
    return mean_loss(model, held_out)


LAB = Lab(
    name="lora-plus",
    rows=(43,),
    chapter="training",
    title=Text("LoRA+: two learning rates", "LoRA+：两个学习率"),
    seconds=40,
    parameters=Parameters,
    run=run,
)
