"""A causal decoder, prefix language models and encoder–decoders on the same samples."""

import random
from statistics import mean
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.examples.blank_infilling import poisson_spans
from easyllm.examples.sample import Sample
from easyllm.examples.span_corruption import SpanTokens, corrupted
from easyllm.lab.lab import Bars, Claim, Lab, LabConfig, Lines, Number, Result, Text, claim, number
from easyllm.lab.small_models import (
    mean_loss,
    new_model,
    small_config,
    smoothed,
    standard_error,
    token_chains,
    train_small,
)
from easyllm.models.families import family_of
from easyllm.nn.config import ModelConfig
from easyllm.plan import count_parameters

VOCABULARY, SENTINELS = 32, 12
START, END, FIRST = VOCABULARY, VOCABULARY + 1, VOCABULARY + 2
TOKENS = SpanTokens(sentinels=tuple(range(FIRST, FIRST + SENTINELS)), end=END, start=START)
WIDTH, LAYERS, HELD_OUT = 64, 4, 64
INNER = 85
"""Width of T5's feed-forwards at which two layers of each stack have as many parameters as four of
the decoder: its attention to the encoder takes the place of a third of each feed-forward."""
NAMES = GPT, UNILM, BY_HEAD, T5, TWICE = (
    *("GPT", "UniLM", "UniLM by head", "T5", "T5 of twice the size"),
)


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 4, "runs": 2}

    mask_ratio: float = Field(default=0.25, gt=0, lt=0.9, description="Share of replaced tokens.")
    steps: PositiveInt = Field(default=200, le=5000, description="Training steps.")
    runs: int = Field(default=3, ge=2, le=20, description="Trainings of each model, by seed.")


def run(parameters: Parameters) -> Result:
    """Trains five models by span corruption, each from several seeds."""
    configs = dict(zip(NAMES, _configs(), strict=True))
    ends: dict[str, list[float]] = {name: [] for name in NAMES}
    curves = dict[str, list[tuple[float, float]]]()
    for seed in range(parameters.seed, parameters.seed + parameters.runs):
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        count = 8 * parameters.steps + HELD_OUT
        texts = token_chains(generator, count, vocab_size=VOCABULARY)
        samples = [_sample(text, parameters, draw) for text in texts]
        for name, config in configs.items():
            model = new_model(config, seed)
            losses = train_small(
                model,
                samples[HELD_OUT:],
                steps=parameters.steps,
                batch_size=8,
                warmup=20,
                seed=seed,
            )
            ends[name].append(mean_loss(model, samples[:HELD_OUT]))
            curves.setdefault(name, smoothed(losses))
    sizes = {name: count_parameters(config).total for name, config in configs.items()}
    gap = [a - b for a, b in zip(ends[GPT], ends[UNILM], strict=True)]
    error = standard_error(gap)
    return Result(
        numbers=_numbers(ends, sizes, mean(gap), error),
        figures=[
            Bars(
                title="Loss on texts that were not trained on",
                x="model",
                y="nats per token",
                groups=NAMES,
                series={"mean": [mean(ends[name]) for name in NAMES]},
            ),
            Lines(
                title="Span corruption on chains of tokens",
                x="step",
                y="loss, nats per token",
                lines=curves,
            ),
        ],
        claims=[_claim(ends, mean(gap), error)],
    )


def _numbers(
    ends: dict[str, list[float]], sizes: dict[str, int], gap: float, error: float
) -> list[Number]:
    zh = {BY_HEAD: "逐头方向的 UniLM", TWICE: "两倍大小的 T5"}
    keys, found = ("gpt", "unilm", "by_head", "t5", "t5_double"), []
    for key, name in zip(keys, NAMES, strict=True):
        label = zh.get(name, name)
        found += [
            number(f"{key}_parameters", sizes[name], f"parameters of {name}", f"{label} 的参数量"),
            number(key, mean(ends[name]), f"loss of {name}, nats", f"{label} 的损失，nats"),
        ]
    return [
        *found,
        number("gap", gap, "GPT minus UniLM, nats", "GPT 减 UniLM，nats"),
        number("gap_error", error, "standard error of that, nats", "其标准误，nats"),
    ]


def _claim(ends: dict[str, list[float]], gap: float, error: float) -> Claim:
    return claim(
        (
            "The article (spaces.ac.cn 9529): at equal parameters, a decoder with a causal "
            "mask is not worse than one whose input is seen in both directions, and the "
            "second stack of T5 doubles the parameters.",
            "文章（spaces.ac.cn 9529）：参数量相同时，因果掩码的解码器不比输入双向可见的"
            "解码器差；T5 的第二个栈使参数翻倍。",
        ),
        (
            f"GPT's loss minus UniLM's is {gap:+.3f} ± {error:.3f} nats over "
            f"{len(ends[GPT])} seeds; T5 has {mean(ends[T5]):.3f} at the size of GPT "
            f"({mean(ends[GPT]):.3f}), and {mean(ends[TWICE]):.3f} at twice the size.",
            f"GPT 与 UniLM 的损失之差为 {gap:+.3f} ± {error:.3f} nats（{len(ends[GPT])} 个"
            f"种子）；T5 与 GPT（{mean(ends[GPT]):.3f}）同等大小时为 "
            f"{mean(ends[T5]):.3f}，两倍大小时为 {mean(ends[TWICE]):.3f}。",
        ),
        "reproduced" if gap <= 2 * error else "not",
        (
            "The task is small and its input short: what is missing depends on both "
            "sides, which favours a mask in both directions.",
            "任务很小，输入很短：缺失的内容取决于两侧，这有利于双向的掩码。",
        ),
    )


def _configs() -> tuple[ModelConfig, ...]:
    """Returns a causal decoder, two with a prefix mask, and two encoder–decoders."""
    vocabulary = FIRST + SENTINELS
    decoder = small_config(vocab_size=vocabulary, layers=LAYERS, width=WIDTH)
    sizes = {
        "model_type": "t5",
        "vocab_size": vocabulary,
        "d_model": WIDTH,
        "d_kv": 16,
        "num_heads": WIDTH // 16,
        "d_ff": INNER,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": START,
    }
    stacks = [
        family_of("t5").read_config(sizes | {"num_layers": layers})
        for layers in (LAYERS // 2, LAYERS)
    ]
    plain = [  # the decoder's head has no scale either
        config.changed(encoder=config.encoder.model_copy(update={"hidden_scale": 1.0}))
        for config in stacks
        if config.encoder is not None
    ]
    prefix = decoder.changed(prompt_mask="prefix_before_last")
    return (decoder, prefix, _by_head(prefix), *plain)


def _by_head(config: ModelConfig) -> ModelConfig:
    """Returns the model with heads that read a prompt forward and backward, in turn."""
    layers = []
    for layer in config.layers:
        mixer = layer.mixer.model_dump()
        mixer["directions"] = ("forward", "backward") * (mixer["num_heads"] // 2)
        layers.append(layer.model_dump() | {"mixer": mixer})
    return config.changed(layers=layers)


def _sample(text: Sample, parameters: Parameters, draw: random.Random) -> Sample:
    ids = list(text.token_ids)
    spans = poisson_spans(len(ids), ratio=parameters.mask_ratio, mean=3.0, rng=draw)
    return corrupted(ids, spans[: SENTINELS - 1], TOKENS)


LAB = Lab(
    name="encoder-decoder",
    rows=(7,),
    chapter="attention",
    title=Text("GPT, UniLM and T5", "GPT、UniLM 与 T5"),
    seconds=120,
    parameters=Parameters,
    run=run,
)
