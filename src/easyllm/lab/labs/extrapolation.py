"""A small model beyond its trained length: RoPE, interpolation, NTK, YaRN, ReRoPE, sinks."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.examples.sample import Sample
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.small_models import mean_loss, new_model, small_config, smoothed, train_small
from easyllm.models.context import ContextConfig, extend_context
from easyllm.nn.decoder import Decoder

VOCABULARY = 16


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 6, "trained": 16, "texts": 2}

    trained: PositiveInt = Field(default=32, ge=16, le=256, description="Trained length, tokens.")
    factor: PositiveInt = Field(default=4, ge=2, le=8, description="Length of the test / trained.")
    steps: PositiveInt = Field(default=1200, le=20000, description="Training steps.")
    texts: PositiveInt = Field(default=24, le=500, description="Number of test texts.")


def run(parameters: Parameters) -> Result:
    """Trains on repeated patterns of a random period, and measures the loss by length."""
    generator = torch.Generator().manual_seed(parameters.seed)
    length, longest = parameters.trained, parameters.trained * parameters.factor
    config = small_config(vocab_size=VOCABULARY, layers=2, width=64).changed(max_seq_len=length)
    model = new_model(config, parameters.seed)
    samples = [_repeated(length, generator) for _ in range(16 * parameters.steps)]
    losses = train_small(
        model, samples, steps=parameters.steps, batch_size=16, seed=parameters.seed, warmup=20
    )
    tests = [_repeated(longest, generator) for _ in range(parameters.texts)]
    methods = {
        "RoPE": None,
        "interpolation": ContextConfig(method="pi", factor=parameters.factor),
        "NTK": ContextConfig(method="ntk", factor=parameters.factor),
        "YaRN": ContextConfig(method="yarn", factor=parameters.factor),
        "ReRoPE": ContextConfig(method="rerope", factor=parameters.factor, window=length // 2),
        "sinks and window": ContextConfig(method="streaming", factor=parameters.factor, sinks=2),
    }
    curves, last = {}, {}
    for name, method in methods.items():
        extended = _with_context(model, method, longest)
        curves[name] = _by_position(extended, tests, length)
        last[name] = curves[name][-1][1]
    inside = curves["RoPE"][0][1]
    order = sorted(last, key=lambda name: last[name])
    good = last["ReRoPE"] < last["RoPE"] and last["NTK"] < last["RoPE"]
    zh = {"sinks and window": "注意力汇与窗口", "interpolation": "位置内插"}
    return Result(
        numbers=[
            number(
                "inside", inside, "loss inside the trained length, nats", "训练长度内的损失（nat）"
            ),
            *(
                number(
                    f"last_{name.replace(' ', '_').lower()}",
                    loss,
                    f"loss in the last part, {name}",
                    f"最后一段的损失，{zh.get(name, name)}",
                )
                for name, loss in last.items()
            ),
        ],
        figures=[
            Lines(
                title=f"Trained on {length} tokens, tested on {longest}",
                x="position in the text (end of the part)",
                y="loss, nats per token",
                lines=curves,
                marks=True,
            ),
            Lines(
                title="Training",
                x="step",
                y="loss, nats per token",
                lines={"loss": smoothed(losses)},
            ),
        ],
        claims=[
            claim(
                (
                    "The article (spaces.ac.cn 9708): beyond the trained length RoPE fails "
                    "(llama2-13b, 8k: loss 8.86), NTK repairs most of it (1.54), ReRoPE more "
                    "(1.43).",
                    "文章（spaces.ac.cn 9708）：超过训练长度后 RoPE 失效（llama2-13b，8k："
                    "损失 8.86），NTK 修复大部分（1.54），ReRoPE 更多（1.43）。",
                ),
                (
                    f"Loss {inside:.2f} inside; in the last part RoPE {last['RoPE']:.2f}, NTK "
                    f"{last['NTK']:.2f}, ReRoPE {last['ReRoPE']:.2f}; best first: "
                    f"{', '.join(order)}.",
                    f"训练长度内损失 {inside:.2f}；最后一段 RoPE {last['RoPE']:.2f}、NTK "
                    f"{last['NTK']:.2f}、ReRoPE {last['ReRoPE']:.2f}；由好到坏："
                    f"{'、'.join(zh.get(name, name) for name in order)}。",
                ),
                "direction" if good else "not",
                (
                    "A model of two layers on repeated patterns, not a 13B model on text: only the "
                    "order is compared.",
                    "两层的模型、重复的模式，而不是 13B 模型与文本：只比较次序。",
                ),
            )
        ],
    )


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


def _by_position(model: Decoder, tests: list[Sample], part: int) -> list[tuple[float, float]]:
    """Returns the mean loss of each part of `part` tokens, at the part's end."""
    found = []
    for start in range(0, tests[0].num_tokens, part):
        masked = [
            Sample(
                s.token_ids,
                tuple(
                    label if max(start, 10) <= i < start + part else -100
                    for i, label in enumerate(s.labels)
                ),
            )
            for s in tests
        ]
        found.append((float(start + part), mean_loss(model, masked)))
    return found


LAB = Lab(
    name="extrapolation",
    rows=(14, 34),
    chapter="positions",
    title=Text("Beyond the trained length", "超出训练长度"),
    seconds=60,
    parameters=Parameters,
    run=run,
)
