"""Pretraining: where the loss starts, where it can go, and documents that do not see each other."""

import math
from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from easyllm.batches.packing import pack
from easyllm.core.json_types import JsonObject
from easyllm.examples.sample import Sample
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.small_models import (
    mean_loss,
    new_model,
    small_config,
    smoothed,
    token_chains,
    train_small,
)
from easyllm.nn.decoder import Decoder


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 5, "vocabulary": 32}

    vocabulary: PositiveInt = Field(default=64, ge=8, le=4096, description="Vocabulary size.")
    steps: PositiveInt = Field(default=200, le=5000, description="Training steps.")
    choices: PositiveInt = Field(default=4, le=64, description="Tokens that may follow a token.")
    learning_rate: PositiveFloat = Field(default=3e-3, le=1, description="Peak rate.")


def run(parameters: Parameters) -> Result:
    """Trains on a Markov chain, whose entropy is known."""
    generator = torch.Generator().manual_seed(parameters.seed)
    size, choices = parameters.vocabulary, parameters.choices
    samples = token_chains(
        generator, 8 * parameters.steps + 32, vocab_size=size, choices=choices, length=64
    )
    held_out, samples = samples[:32], samples[32:]
    model = new_model(small_config(vocab_size=size), parameters.seed)
    first = mean_loss(model, held_out)
    together = _logits(model, held_out[:4])
    alone = torch.cat([_logits(model, [s]) for s in held_out[:4]])
    packed_error = float((together - alone).abs().max())
    losses = train_small(
        model,
        samples,
        steps=parameters.steps,
        batch_size=8,
        warmup=10,
        learning_rate=parameters.learning_rate,
        seed=parameters.seed,
    )
    last, entropy = mean_loss(model, held_out), math.log(choices)
    return Result(
        numbers=[
            number(
                "first", first, "loss of the new model, nats per token", "新模型的损失，nat/词元"
            ),
            number("ln_v", math.log(size), "ln V", "ln V"),
            number("last", last, "held-out loss at the end", "结束时的留出集损失"),
            number(
                "entropy", entropy, "entropy of the data, the least loss", "数据的熵，损失的下限"
            ),
            number(
                "packed_error",
                packed_error,
                "packed documents against each alone, logits",
                "打包与单独计算之差（logits）",
                2,
            ),
        ],
        figures=[
            Lines(
                title=f"A chain of {size} tokens",
                x="step",
                y="loss, nats per token",
                lines={
                    "training loss": smoothed(losses),
                    "ln V": [(1.0, math.log(size)), (float(parameters.steps), math.log(size))],
                    "entropy of the data": [(1.0, entropy), (float(parameters.steps), entropy)],
                },
            ),
        ],
        claims=[
            claim(
                (
                    "A new model with small weights predicts nothing: its loss is ln V. Training "
                    "cannot bring it below the entropy of the data.",
                    "小权重的新模型什么也预测不了：损失为 ln V。训练无法使其低于数据的熵。",
                ),
                (
                    f"{first:.3f} at the start (ln V = {math.log(size):.3f}), {last:.3f} after "
                    f"{parameters.steps} steps, the entropy is {entropy:.3f}; packed documents "
                    f"differ from each alone by {packed_error:.0e}.",
                    f"开始时 {first:.3f}（ln V = {math.log(size):.3f}），{parameters.steps} 步后 "
                    f"{last:.3f}，熵为 {entropy:.3f}；打包与单独计算相差 {packed_error:.0e}。",
                ),
                "reproduced"
                if abs(first - math.log(size)) < 0.1 and entropy < last < first
                else "not",
            )
        ],
    )


@torch.no_grad()
def _logits(model: Decoder, samples: list[Sample]) -> torch.Tensor:
    batch = pack(samples)
    logits: torch.Tensor = model.head(model(batch.token_ids, batch.context()))
    return logits


LAB = Lab(
    name="pretraining",
    rows=(35,),
    chapter="training",
    title=Text("Pretraining: from ln V to the entropy", "预训练：从 ln V 到数据的熵"),
    seconds=15,
    parameters=Parameters,
    run=run,
)
