"""Where facts are: recall without each feed-forward, and without each attention of equal size."""

from dataclasses import dataclass, field
from statistics import mean
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from easyllm.core.json_types import JsonObject
from easyllm.examples.sample import Sample
from easyllm.lab.lab import Bars, Claim, Lab, LabConfig, Lines, Number, Result, Text, claim, number
from easyllm.lab.small_models import new_model, small_config, smoothed, standard_error, train_small
from easyllm.nn.config import ModelConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.plan import count_parameters
from easyllm.probe.ablation import Block, ablated
from easyllm.probe.residual import BLOCKS

WIDTH, INNER, LAYERS = 48, 64, 4
"""Attention has 4 · 48² parameters in a layer and the feed-forward 3 · 48 · 64, the same number."""
NAMES, VALUES = 64, 64
FIRST, LAST = 0, NAMES
VALUE = 2 * NAMES
"""The first ids of first names, last names and values."""


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 5, "runs": 2, "facts": 64}

    facts: PositiveInt = Field(default=2048, le=NAMES * NAMES, description="Number of facts.")
    steps: PositiveInt = Field(default=500, le=20000, description="Training steps.")
    runs: int = Field(default=5, ge=2, le=20, description="Trainings, by seed.")


@dataclass(frozen=True, slots=True)
class Recalls:
    """Shares of the facts that models recall, a list entry for each seed.

    Attributes:
        whole: by the complete model.
        without: by kind of block and layer, without that block.
        without_all: by kind, without the blocks of all layers.
    """

    whole: list[float] = field(default_factory=list)
    without: dict[Block, list[float]] = field(default_factory=dict)
    without_all: dict[str, list[float]] = field(default_factory=dict)

    def lost(self, kind: str) -> list[float]:
        """Returns what recall loses without one block of a kind, the mean over layers by seed."""
        layers = [values for (_, block), values in self.without.items() if block == kind]
        means = [mean(values) for values in zip(*layers, strict=True)]
        return [whole - rest for whole, rest in zip(self.whole, means, strict=True)]


def run(parameters: Parameters) -> Result:
    """Trains models on facts, and counts those that each recalls without one of its blocks."""
    config, recalls = _config(), Recalls()
    curves = dict[str, list[tuple[float, float]]]()
    for seed in range(parameters.seed, parameters.seed + parameters.runs):
        facts = _facts(parameters.facts, seed)
        model = new_model(config, seed)
        losses = train_small(
            model,
            [Sample.from_mask(fact, [False, False, True]) for fact in facts.tolist()],
            steps=parameters.steps,
            batch_size=min(256, parameters.facts),
            warmup=20,
            seed=seed,
        )
        curves[f"seed {seed}"] = smoothed(losses)
        _measure(model.eval(), facts, recalls)
    return Result(
        numbers=_numbers(config, recalls),
        figures=[
            Bars(
                title="Recall without one block",
                x="layer",
                y="share of facts recalled",
                groups=["none", *map(str, range(LAYERS))],
                series={
                    label: [mean(recalls.whole)]
                    + [mean(recalls.without[layer, kind]) for layer in range(LAYERS)]
                    for kind, label in zip(BLOCKS, ("attention", "feed-forward"), strict=True)
                },
            ),
            Lines(title="Training", x="step", y="loss, nats per fact", lines=curves),
        ],
        claims=[_claim(recalls)],
    )


def _config() -> ModelConfig:
    """Returns a model whose attention and feed-forwards have as many parameters."""
    config = small_config(vocab_size=VALUE + VALUES, layers=LAYERS, width=WIDTH)
    layers = []
    for layer in config.layers:
        block = layer.feed_forward.model_copy(update={"intermediate_size": INNER})
        layers.append(layer.model_copy(update={"feed_forward": block}))
    return config.changed(layers=layers)


def _facts(count: int, seed: int) -> Tensor:
    """Returns facts [count, 3] int64: a first name, a last name and a random value.

    Every pair of names is drawn at most once, so neither name alone determines the value.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randperm(NAMES * NAMES, generator=generator)[:count]
    values = torch.randint(VALUES, (count,), generator=generator)
    return torch.stack([FIRST + pairs // NAMES, LAST + pairs % NAMES, VALUE + values], dim=1)


def _measure(model: Decoder, facts: Tensor, recalls: Recalls) -> None:
    """Adds the recall of one model, whole and without each block."""
    recalls.whole.append(_recall(model, facts))
    for kind in BLOCKS:
        blocks: list[Block] = [(layer, kind) for layer in range(LAYERS)]
        for block in blocks:
            with ablated(model, [block]):
                recalls.without.setdefault(block, []).append(_recall(model, facts))
        with ablated(model, blocks):
            recalls.without_all.setdefault(kind, []).append(_recall(model, facts))


def _recall(model: Decoder, facts: Tensor) -> float:
    """Returns the share of the facts whose value is the most probable token after the names."""
    context = ForwardContext.packed([2] * len(facts))
    with torch.no_grad():
        hidden = model(facts[:, :2].flatten(), context)
        found = model.head(hidden[1::2]).argmax(-1)
    return float((found == facts[:, 2]).double().mean())


def _interval(values: list[float]) -> float:
    """Returns twice the standard error of the mean."""
    return 2 * standard_error(values)


def _numbers(config: ModelConfig, recalls: Recalls) -> list[Number]:
    count = count_parameters(config)
    numbers = [
        number(
            "attention_parameters", count.attention, "parameters of attention", "注意力的参数量"
        ),
        number(
            "feed_forward_parameters",
            count.feed_forward,
            "parameters of feed-forwards",
            "前馈的参数量",
        ),
        number("recall", mean(recalls.whole), "recall", "召回率"),
    ]
    zh = {"attention": "注意力", "feed-forward": "前馈"}
    for kind, label in zip(BLOCKS, zh, strict=True):
        key, lost = label.replace("-", "_"), recalls.lost(kind)
        numbers += [
            number(
                f"lost_{key}",
                mean(lost),
                f"recall lost without the {label} of one layer",
                f"去掉一层的{zh[label]}后损失的召回率",
            ),
            number(
                f"interval_{key}", _interval(lost), "± (two standard errors)", "±（两倍标准误）"
            ),
            number(
                f"without_{key}",
                mean(recalls.without_all[kind]),
                f"recall without the {label} of all layers",
                f"去掉所有层的{zh[label]}后的召回率",
            ),
        ]
    return numbers


def _claim(recalls: Recalls) -> Claim:
    attention, feed_forward = (recalls.lost(kind) for kind in BLOCKS)
    more = [b - a for a, b in zip(attention, feed_forward, strict=True)]
    seen = f"{mean(more):+.3f} ± {_interval(more):.3f}"
    return claim(
        (
            "Feed-forwards are a memory of keys and values that holds facts (arXiv 2012.14913), "
            "and attention brings to a token what others hold.",
            "前馈是保存事实的键值记忆（arXiv 2012.14913），注意力把其他词元的内容带到当前词元。",
        ),
        (
            f"Without the feed-forward of one layer, recall falls by {mean(feed_forward):.3f}, "
            f"without its attention of as many parameters by {mean(attention):.3f}; the "
            f"difference is {seen} over {len(more)} seeds (two standard errors).",
            f"去掉一层的前馈，召回率下降 {mean(feed_forward):.3f}；去掉参数量相同的注意力，下降 "
            f"{mean(attention):.3f}；{len(more)} 个种子的差为 {seen}（两倍标准误）。",
        ),
        "reproduced" if mean(more) > _interval(more) else "not",
        (
            "Attention is needed once, to bring the first name to the last; without all of it "
            "recall is lost, too.",
            "注意力只需用一次，把名带到姓处；去掉所有注意力，召回率同样丧失。",
        ),
    )


LAB = Lab(
    name="facts",
    rows=(1,),
    chapter="survey",
    title=Text("Where the facts are", "事实在哪里"),
    seconds=120,
    parameters=Parameters,
    run=run,
)
