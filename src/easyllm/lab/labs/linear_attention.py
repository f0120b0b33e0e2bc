"""Linear attention: three forms of one result, and a cost that grows with the length only."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.small_models import small_config
from easyllm.nn.config import LinearAttentionConfig, ModelConfig
from easyllm.ops.linear_attention import (
    FEATURE_MAPS,
    Features,
    cumulative,
    quadratic,
    recurrent,
    weights,
)
from easyllm.plan.compute import forward_flops


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"tokens": 48}

    tokens: PositiveInt = Field(default=200, ge=8, le=2048, description="Length of the sequence.")
    head_dim: PositiveInt = Field(default=16, le=256, description="Width of a head.")


def run(parameters: Parameters) -> Result:
    """Compares the forms of linear attention, and counts FLOPs by length."""
    generator = torch.Generator().manual_seed(parameters.seed)
    shape = (3, parameters.tokens, 2, parameters.head_dim)
    q, k, v = torch.randn(*shape, generator=generator, dtype=torch.float64)
    apart, lines = 0.0, {}
    for name, kind in FEATURE_MAPS.items():
        x = Features.plain(kind.query(q), kind.key(k), v)
        reference = quadratic(x, kind, causal=True)
        for form in (cumulative(x, kind)[0], recurrent(x, kind)[0]):
            apart = max(apart, float((form - reference).abs().max()))
        last = weights(x, kind, causal=True)[0, -1].sort(descending=True).values
        lines[_NAMES[name]] = _points(last.tolist())
    scores = (q[-1, 0] @ k[:, 0].T / parameters.head_dim**0.5).softmax(-1)
    lines["softmax attention"] = _points(scores.sort(descending=True).values.tolist())
    kind = FEATURE_MAPS["softmax"]
    x = Features.plain(kind.query(q), kind.key(k), v)
    row_error = float((weights(x, kind, causal=False).sum(-1) - 1).abs().max())
    lengths = [256 << i for i in range(8)]
    config = small_config(width=64)
    costs = {
        "softmax attention": _costs(config, lengths),
        "linear attention": _costs(_linear(config), lengths),
    }
    slopes = {name: _slope(points) for name, points in costs.items()}
    return Result(
        numbers=[
            number(
                "largest_difference",
                apart,
                "largest difference of the three forms",
                "三种形式的最大差异",
                2,
            ),
            number(
                "row_sum_error",
                row_error,
                "row sums of the two-softmax weights, less 1",
                "双 softmax 权重的行和与 1 之差",
                2,
            ),
            number(
                "softmax_slope",
                slopes["softmax attention"],
                "slope of log FLOPs by log length, softmax",
                "FLOPs 对长度的双对数斜率，softmax",
            ),
            number(
                "linear_slope",
                slopes["linear attention"],
                "slope, linear attention",
                "斜率，线性注意力",
            ),
        ],
        figures=[
            Lines(
                title="Attention FLOPs of a small model by length",
                x="tokens",
                y="FLOPs of the mixer",
                lines=costs,
                log_x=True,
                log_y=True,
                marks=True,
            ),
            Lines(
                title="Weights of the last query, sorted",
                x="rank of the key",
                y="weight",
                lines=lines,
                log_y=True,
            ),
        ],
        claims=[
            claim(
                (
                    "The article (spaces.ac.cn 7546): with sim(q, k) = φ(q)·φ(k) the sums can be "
                    "taken over keys first, so causal attention is a recurrence "
                    "S ← S + φ(k) vᵀ with linear cost.",
                    "文章（spaces.ac.cn 7546）：若 sim(q, k) = φ(q)·φ(k)，可先对键求和，"
                    "因果注意力成为递推 S ← S + φ(k) vᵀ，代价为线性。",
                ),
                (
                    f"All three forms agree within {apart:.0e}; between 2,048 and 32,768 tokens "
                    f"FLOPs grow with the power {slopes['linear attention']:.2f} of the length, "
                    f"those of softmax attention with {slopes['softmax attention']:.2f}.",
                    f"三种形式相差至多 {apart:.0e}；在 2,048 到 32,768 词元之间，FLOPs 随长度的 "
                    f"{slopes['linear attention']:.2f} 次幂增长，softmax 注意力为 "
                    f"{slopes['softmax attention']:.2f} 次幂。",
                ),
                "reproduced" if apart < 1e-9 and slopes["linear attention"] < 1.05 else "not",
            )
        ],
    )


def _points(values: list[float]) -> list[tuple[float, float]]:
    return [(float(i + 1), y) for i, y in enumerate(values) if y > 0]


def _linear(config: ModelConfig) -> ModelConfig:
    mixer = LinearAttentionConfig(num_heads=4, head_dim=16)
    layers = [layer.model_copy(update={"mixer": mixer}) for layer in config.layers]
    return config.changed(family="easyllm", layers=tuple(layers))


def _costs(config: ModelConfig, lengths: list[int]) -> list[tuple[float, float]]:
    found = [forward_flops(config, [length]) for length in lengths]
    return [(float(n), float(f.attention + f.scores)) for n, f in zip(lengths, found, strict=True)]


def _slope(points: list[tuple[float, float]]) -> float:
    (x0, y0), (x1, y1) = points[3], points[-1]
    ratio = torch.tensor([y1 / y0, x1 / x0], dtype=torch.float64).log()
    return float(ratio[0] / ratio[1])


_NAMES = {"elu": "elu + 1", "cosine": "1 + cos", "softmax": "two softmaxes"}

LAB = Lab(
    name="linear-attention",
    rows=(6,),
    chapter="attention",
    title=Text("Attention without a softmax", "不用 softmax 的注意力"),
    seconds=3,
    parameters=Parameters,
    run=run,
)
