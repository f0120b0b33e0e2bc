"""Pre-norm and post-norm: gradients at the start, and training without a warm-up."""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from easyllm.batches.packing import pack
from easyllm.core.json_types import JsonObject
from easyllm.examples.sample import Sample
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.small_models import new_model, small_config, smoothed, token_chains, train_small
from easyllm.nn.decoder import Decoder, DecoderLayer
from easyllm.nn.linear import Linear
from easyllm.train.objectives.language_model import LanguageModel

Placement = Literal["pre", "post"]
VOCABULARY = 32


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"layers": 4, "steps": 3}

    layers: PositiveInt = Field(default=12, ge=2, le=64, description="Number of layers.")
    steps: PositiveInt = Field(default=80, le=2000, description="Training steps.")
    learning_rate: PositiveFloat = Field(default=3e-3, le=1, description="Constant rate.")


def run(parameters: Parameters) -> Result:
    """Trains the same small model in both forms, without a warm-up."""
    generator = torch.Generator().manual_seed(parameters.seed)
    samples = token_chains(generator, 8 * parameters.steps, vocab_size=VOCABULARY)
    curves, norms, last = {}, {}, {}
    for placement in ("pre", "post"):
        model = _model(parameters, placement)
        norms[placement] = _gradient_norms(model, samples[:8])
        losses = train_small(
            model,
            samples,
            steps=parameters.steps,
            batch_size=8,
            learning_rate=parameters.learning_rate,
            seed=parameters.seed,
        )
        curves[f"{placement}-norm"] = smoothed(losses)
        tail = losses[-10:]
        last[placement] = sum(tail) / len(tail)
    best, chance = math.log(2), math.log(VOCABULARY)
    ratio = {name: each[-1][1] / each[0][1] for name, each in norms.items()}
    stalls = last["post"] > (best + chance) / 2 > last["pre"]
    return Result(
        numbers=[
            number(
                "pre_loss",
                last["pre"],
                "loss at the end, pre-norm, nats",
                "结束时的损失，前置归一化（nat）",
            ),
            number(
                "post_loss",
                last["post"],
                "loss at the end, post-norm, nats",
                "结束时的损失，后置归一化（nat）",
            ),
            number("chance", chance, "loss of guessing", "随机猜测的损失"),
            number("possible", best, "lowest possible loss", "可能的最低损失"),
            number(
                "pre_ratio",
                ratio["pre"],
                "gradient norm, last layer / first, pre-norm",
                "梯度范数，末层 / 首层，前置归一化",
            ),
            number(
                "post_ratio",
                ratio["post"],
                "gradient norm, last layer / first, post-norm",
                "梯度范数，末层 / 首层，后置归一化",
            ),
        ],
        figures=[
            Lines(
                title=f"{parameters.layers} layers, no warm-up",
                x="step",
                y="loss, nats per token",
                lines=curves,
            ),
            Lines(
                title="First gradient by layer",
                x="layer",
                y="norm of the gradient",
                lines={f"{name}-norm": each for name, each in norms.items()},
                log_y=True,
                marks=True,
            ),
        ],
        claims=[
            claim(
                (
                    "Xiong et al. (arXiv 2002.04745): at initialisation the gradients of post-norm "
                    "are large near the output, so it needs a warm-up; pre-norm trains without "
                    "one.",
                    "Xiong 等（arXiv 2002.04745）：初始化时后置归一化在靠近输出处梯度很大，"
                    "因此需要预热；前置归一化不需要。",
                ),
                (
                    f"Without a warm-up pre-norm reaches {last['pre']:.2f} and post-norm "
                    f"{last['post']:.2f} (guessing: {chance:.2f}); the last layer's gradient is "
                    f"{ratio['post']:.1f} times the first's in post-norm, {ratio['pre']:.1f} times "
                    "in pre-norm.",
                    f"不预热时前置归一化达到 {last['pre']:.2f}，后置为 {last['post']:.2f}"
                    f"（随机猜测为 {chance:.2f}）；末层梯度与首层之比，后置为 {ratio['post']:.1f}，"
                    f"前置为 {ratio['pre']:.1f}。",
                ),
                "direction" if stalls and ratio["post"] > ratio["pre"] else "not",
                ("A small model on a chain of tokens.", "小模型，数据为词元链。"),
            )
        ],
    )


def _model(parameters: Parameters, placement: Placement) -> Decoder:
    config = small_config(vocab_size=VOCABULARY, layers=parameters.layers, width=32)
    layers = [x.model_copy(update={"norm_placement": placement}) for x in config.layers]
    config = config.changed(
        family="easyllm", layers=tuple(layers), tie_embeddings=False, final_norm=placement == "pre"
    )
    model = new_model(config, parameters.seed)
    torch.manual_seed(parameters.seed)
    for module in model.modules():  # the paper's initialisation
        if isinstance(module, Linear):
            nn.init.xavier_uniform_(module.weight)
    return model


def _gradient_norms(model: Decoder, samples: list[Sample]) -> list[tuple[float, float]]:
    """Returns the norm of the first gradient of each layer's feed-forward."""
    batch = pack(samples)
    (LanguageModel().loss(model, batch).sum / batch.num_trained).backward()
    found = []
    for number_of, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        grads = [p.grad for p in layer.feed_forward.parameters() if p.grad is not None]
        found.append((float(number_of), float(torch.stack([g.norm() for g in grads]).norm())))
    model.zero_grad(set_to_none=True)
    return found


LAB = Lab(
    name="norm-placement",
    rows=(23,),
    chapter="costs",
    title=Text("Pre-norm and post-norm", "前置与后置归一化"),
    seconds=30,
    parameters=Parameters,
    run=run,
)
