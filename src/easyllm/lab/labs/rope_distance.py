"""RoPE: scores depend on distance alone, and fall with it."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Claim, Lab, LabConfig, Lines, Number, Result, Text
from easyllm.nn.position_config import Rope
from easyllm.nn.rope_scaling import rope_frequencies
from easyllm.ops.rotary import apply_rotary


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"distance": 64}

    head_dim: PositiveInt = Field(default=64, multiple_of=2, le=512, description="Width of a head.")
    theta: float = Field(default=10000.0, gt=1, description="Base of the frequencies.")
    distance: PositiveInt = Field(default=1024, ge=16, le=65536, description="Largest distance.")


def run(parameters: Parameters) -> Result:
    """Rotates queries and keys, and compares scores of pairs at equal distances."""
    width, longest = parameters.head_dim, parameters.distance
    frequencies, _ = rope_frequencies(Rope(theta=parameters.theta), width, longest)
    generator = torch.Generator().manual_seed(parameters.seed)
    query, key = torch.randn(2, width, generator=generator, dtype=torch.float64)
    positions = torch.arange(2 * longest, dtype=torch.float64)
    angles = positions[:, None] * frequencies.double()
    cos, sin = angles.cos(), angles.sin()

    def rotated(x: torch.Tensor) -> torch.Tensor:
        return apply_rotary(x.expand(len(positions), 1, width).contiguous(), cos, sin)[:, 0]

    queries, keys = rotated(query), rotated(key)
    scores = queries @ keys.T  # [m, n]
    spread = max(
        float(scores.diagonal(-distance).std()) for distance in (1, longest // 4, longest // 2)
    )
    norm_change = float((queries.norm(dim=1) / query.norm() - 1).abs().max())
    # two equal vectors: the score is a sum of cosines, largest at distance 0
    same = rotated(torch.ones(width, dtype=torch.float64))
    by_distance = (same @ same[0]) / width
    points = [(float(d), float(by_distance[d])) for d in range(longest)]
    return _result(parameters, spread=spread, norm_change=norm_change, points=points)


def _result(
    parameters: Parameters,
    *,
    spread: float,
    norm_change: float,
    points: list[tuple[float, float]],
) -> Result:
    """Returns numbers, figure and claim."""
    half = points[len(points) // 2 :]
    far = sum(score for _, score in half) / len(half)
    return Result(
        numbers=[
            Number(
                key="spread_at_equal_distance",
                value=spread,
                label=Text("spread of scores at one distance", "同一距离下分数的标准差"),
                digits=2,
            ),
            Number(
                key="norm_change",
                value=norm_change,
                label=Text("largest relative change of a norm", "范数的最大相对变化"),
                digits=2,
            ),
            Number(
                key="far_score",
                value=far,
                label=Text(
                    "mean score of equal vectors in the far half, of 1 at distance 0",
                    "相同向量在远半段的平均分数（距离 0 时为 1）",
                ),
            ),
        ],
        figures=[
            Lines(
                title=f"Equal vectors under RoPE, base {parameters.theta:g}",
                x="distance in tokens",
                y="score, as a share of that at distance 0",
                lines={"score": points},
            )
        ],
        claims=[
            Claim(
                claim=Text(
                    "The article (RoFormer, arXiv 2104.09864, sections 3.3 and 3.4.3): the product "
                    "of a rotated query and key depends on their distance only, and decays with it "
                    "in the long run.",
                    "文章（RoFormer，arXiv 2104.09864，3.3 与 3.4.3 节）："
                    "旋转后的查询与键的内积只依赖于相对距离，并随距离长程衰减。",
                ),
                seen=Text(
                    f"Scores of one distance differ by {spread:.1e} at most between positions; "
                    f"equal vectors score {far:.2f} on average in the far half, and 1 at "
                    "distance 0.",
                    f"同一距离的分数在不同位置间至多相差 {spread:.1e}；"
                    f"相同向量在远半段平均得 {far:.2f}，距离 0 时为 1。",
                ),
                outcome="reproduced" if spread < 1e-9 and far < 0.7 else "not",
            )
        ],
    )


LAB = Lab(
    name="rope-distance",
    rows=(12, 13),
    chapter="positions",
    title=Text("RoPE: scores depend on distance", "RoPE：分数只依赖相对距离"),
    seconds=2,
    parameters=Parameters,
    run=run,
)
