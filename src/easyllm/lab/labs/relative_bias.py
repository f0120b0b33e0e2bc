"""Relative positions as a bias: T5's buckets and ALiBi's slopes."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.nn.position import AlibiPosition, alibi_slopes, t5_buckets


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"distance": 64}

    heads: PositiveInt = Field(default=8, le=64, description="Number of heads of ALiBi.")
    distance: PositiveInt = Field(default=192, ge=32, le=4096, description="Largest distance.")
    buckets: PositiveInt = Field(default=32, ge=4, le=256, description="Number of T5's buckets.")
    max_distance: PositiveInt = Field(
        default=128, ge=16, le=4096, description="Distance from which T5 has one bucket."
    )


def run(parameters: Parameters) -> Result:
    """Computes the buckets of T5 and the biases of ALiBi by distance."""
    sizes = {"num_buckets": parameters.buckets, "max_distance": parameters.max_distance}
    past = -torch.arange(parameters.distance)
    both = t5_buckets(past, bidirectional=True, **sizes)
    causal = t5_buckets(past, bidirectional=False, **sizes)
    slopes = alibi_slopes(parameters.heads)
    usual = t5_buckets(-torch.arange(31), bidirectional=True).tolist()
    expected = [*range(8), *[8] * 4, *[9] * 4, *[10] * 7, *[11] * 8]
    eight, forty = alibi_slopes(8), alibi_slopes(40)
    position = AlibiPosition(parameters.heads)
    query = torch.tensor([parameters.distance - 1])
    bias = position.bias(query, torch.arange(parameters.distance))[:, 0]  # [H, distance]
    drawn = sorted({0, parameters.heads // 2, parameters.heads - 1})
    lines = {
        f"head {h + 1}, slope {float(slopes[h]):.4g}": [
            (float(d), float(bias[h, parameters.distance - 1 - d]))
            for d in range(parameters.distance)
        ]
        for h in drawn
    }
    return Result(
        numbers=[
            number(
                "buckets_as_published",
                int(usual == expected),
                "T5 buckets of distances 0 to 30 as published (1 = yes)",
                "距离 0 到 30 的 T5 桶与公布的相同（1 = 是）",
            ),
            number(
                "buckets_used",
                int(both.max()) + 1,
                "buckets used on one side, bidirectional",
                "双向时一侧用到的桶数",
            ),
            number(
                "buckets_used_causal",
                int(causal.max()) + 1,
                "buckets used, causal",
                "因果时用到的桶数",
            ),
            number(
                "first_slope",
                float(eight[0]),
                "ALiBi, 8 heads: first slope",
                "ALiBi，8 个头：第一个斜率",
            ),
            number("last_slope", float(eight[-1]), "last slope", "最后一个斜率"),
            number(
                "slope_33_of_40",
                float(forty[32]),
                "ALiBi, 40 heads: slope of head 33",
                "ALiBi，40 个头：第 33 个头的斜率",
            ),
        ],
        figures=[
            Lines(
                title=f"T5: {parameters.buckets} buckets",
                x="distance to an earlier token",
                y="bucket",
                lines={
                    "causal": [(float(i), float(b)) for i, b in enumerate(causal)],
                    "bidirectional": [(float(i), float(b)) for i, b in enumerate(both)],
                },
            ),
            Lines(
                title=f"ALiBi, {parameters.heads} heads",
                x="distance to an earlier token",
                y="bias added to the score",
                lines=lines,
            ),
        ],
        claims=[
            claim(
                (
                    "T5 (as in the article, kexue.fm 8130): of 32 bidirectional buckets, distances "
                    "0–7 have one each, then 4, 4, 7 and 8 distances share one up to 30.",
                    "T5（见文章 kexue.fm 8130）：32 个双向桶中，距离 0–7 各占一个，"
                    "之后直到 30，依次有 4、4、7、8 个距离共用一个桶。",
                ),
                (
                    "The buckets of distances 0 to 30 are "
                    f"{'those' if usual == expected else 'not those'}.",
                    f"距离 0 到 30 的桶与之{'相同' if usual == expected else '不同'}。",
                ),
                "reproduced" if usual == expected else "not",
            ),
            claim(
                (
                    "ALiBi (arXiv 2108.12409, section 3): with 8 heads the slopes are 1/2, 1/4 … "
                    "1/256.",
                    "ALiBi（arXiv 2108.12409，第 3 节）：8 个头的斜率为 1/2、1/4 … 1/256。",
                ),
                (
                    f"From {float(eight[0]):.4g} to {float(eight[-1]):.6g}; 40 heads take the 32 "
                    f"slopes of 32 heads, then every other one of 64: head 33 has "
                    f"{float(forty[32]):.4f}.",
                    f"从 {float(eight[0]):.4g} 到 {float(eight[-1]):.6g}；40 个头先取 32 "
                    "个头的斜率，"
                    f"再隔一个取 64 个头的斜率：第 33 个头为 {float(forty[32]):.4f}。",
                ),
                "reproduced" if bool((eight == 2.0 ** -torch.arange(1, 9)).all()) else "not",
            ),
        ],
    )


LAB = Lab(
    name="relative-bias",
    rows=(8, 11),
    chapter="positions",
    title=Text("Relative positions: T5 buckets and ALiBi", "相对位置：T5 分桶与 ALiBi"),
    seconds=2,
    parameters=Parameters,
    run=run,
)
