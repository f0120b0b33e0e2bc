"""Gradient accumulation equals a large batch, unless losses are averaged twice; exact resume."""

import copy
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.batches.packing import pack
from easyllm.core.json_types import JsonObject
from easyllm.examples.sample import Sample
from easyllm.lab.lab import Bars, Lab, LabConfig, Result, Text, claim, number
from easyllm.lab.small_models import new_model, small_config, token_chains
from easyllm.nn.decoder import Decoder
from easyllm.train.loop import accumulate, apply_gradients
from easyllm.train.objectives.language_model import LanguageModel
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig
from easyllm.train.precision import PrecisionPolicy


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 4}

    steps: PositiveInt = Field(default=20, ge=2, le=500, description="Steps of the resumed run.")
    longest: PositiveInt = Field(default=48, ge=8, le=256, description="Longest text, in tokens.")


def run(parameters: Parameters) -> Result:
    """Compares gradients of one batch of 8 with those of its micro-batches."""
    generator = torch.Generator().manual_seed(parameters.seed)
    chains = token_chains(generator, 8 * parameters.steps, length=parameters.longest)
    ends = torch.randint(3, parameters.longest + 1, (len(chains),), generator=generator).tolist()
    samples = [Sample.from_mask(s.token_ids[:n]) for s, n in zip(chains, ends, strict=True)]
    model = new_model(small_config(vocab_size=32, width=32), parameters.seed).double()
    eight = samples[:8]
    whole = _gradient(model, [eight])
    summed, averaged = {}, {}
    for size in (4, 2, 1):
        parts = [eight[i : i + size] for i in range(0, 8, size)]
        summed[size] = _apart(_gradient(model, parts), whole)
        each = [_gradient(model, [part]) for part in parts]
        mean = torch.stack(each).mean(0)  # the mean of the micro-batches' means
        averaged[size] = _apart(mean, whole)
    resumed = _resume_difference(samples, parameters)
    groups = [f"{8 // size} × {size}" for size in summed]
    return Result(
        numbers=[
            number(
                "summed",
                max(summed.values()),
                "relative difference, loss = sum ÷ all tokens",
                "相对差异，损失 = 总和 ÷ 全部词元",
                2,
            ),
            *(
                number(
                    f"averaged_{size}",
                    value,
                    f"relative difference, mean of means, {8 // size} × {size}",
                    f"相对差异，平均的平均，{8 // size} × {size}",
                )
                for size, value in averaged.items()
            ),
            number(
                "resumed",
                resumed,
                "difference of the weights after a resume",
                "恢复后权重的差异",
                2,
            ),
        ],
        figures=[
            Bars(
                title="Gradient of 8 texts against one batch",
                x="micro-batches × size",
                y="relative difference",
                groups=groups,
                series={
                    "sum ÷ all tokens": [max(v, 1e-17) for v in summed.values()],
                    "mean of means": list(averaged.values()),
                },
                log_y=True,
            )
        ],
        claims=[
            claim(
                (
                    "Trainers promise that a batch of 8 equals 2 × 4 accumulated, and that a "
                    "resumed run equals an uninterrupted one.",
                    "训练器承诺：批大小 8 等价于 2 × 4 的累积；恢复后的运行等价于未中断的运行。",
                ),
                (
                    f"With one divisor for the step the gradients differ by "
                    f"{max(summed.values()):.0e}; a mean of means differs by up to "
                    f"{max(averaged.values()):.0%}, because texts have different lengths; after a "
                    f"resume weights differ by {resumed:g}.",
                    f"每步只用一个除数时梯度相差 {max(summed.values()):.0e}；"
                    "平均的平均因文本长度不同"
                    f"相差可达 {max(averaged.values()):.0%}；恢复后权重相差 {resumed:g}。",
                ),
                "reproduced" if max(summed.values()) < 1e-9 and resumed == 0 else "not",
            )
        ],
    )


def _gradient(model: Decoder, parts: list[list[Sample]]) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    accumulate(model, LanguageModel(), [pack(part) for part in parts])
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _resume_difference(samples: list[Sample], parameters: Parameters) -> float:
    """Returns the largest difference of the weights of an interrupted and a continuous run."""
    model = new_model(small_config(vocab_size=32, width=32), parameters.seed)
    optimizer = _optimizer(model)
    half = parameters.steps // 2
    for step in range(half):
        _step(model, optimizer, samples, step)
    state = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    other = copy.deepcopy(model)
    restored = _optimizer(other)
    restored.load_tensors(state)
    for step in range(half, parameters.steps):
        _step(model, optimizer, samples, step)
        _step(other, restored, samples, step)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def _optimizer(model: Decoder) -> MasterOptimizer:
    return MasterOptimizer(dict(model.named_parameters()), AdamWConfig(learning_rate=1e-3))


def _step(model: Decoder, optimizer: MasterOptimizer, samples: list[Sample], step: int) -> None:
    precision = PrecisionPolicy()
    batch = pack(samples[8 * step : 8 * step + 8])
    loss, _ = accumulate(model, LanguageModel(), [batch], precision)
    apply_gradients(optimizer, precision, 1.0, 1.0, loss)


LAB = Lab(
    name="accumulation",
    rows=(54,),
    chapter="training",
    title=Text("Gradient accumulation and resuming", "梯度累积与恢复训练"),
    seconds=5,
    parameters=Parameters,
    run=run,
)
