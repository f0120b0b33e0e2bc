"""Absolute positions: a table that ends, and sinusoids whose products depend on distance."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Grid, Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.nn.embedding_position import build_embedding_position
from easyllm.nn.position_config import Learned, Sinusoidal


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"length": 64}

    length: PositiveInt = Field(default=512, ge=32, le=8192, description="Number of positions.")
    width: PositiveInt = Field(default=128, multiple_of=2, le=1024, description="Model width.")
    base: float = Field(default=10000.0, gt=1, description="Base of the frequencies.")


def run(parameters: Parameters) -> Result:
    """Compares products of sinusoidal positions at equal distances, and reads past a table."""
    length, width = parameters.length, parameters.width
    positions = torch.arange(length)
    nothing = torch.zeros(length, width, dtype=torch.float64)
    module = build_embedding_position(Sinusoidal(base=parameters.base), length, width)
    table = module(nothing, positions)
    products = table @ table.T / (width / 2)
    spread = max(float(products.diagonal(d).std()) for d in (1, length // 4, length // 2))
    # one matrix takes every PE(t) to PE(t + k)
    step = 7
    fitted = torch.linalg.lstsq(table[:-step], table[step:], driver="gelsd").solution
    shift_error = float((table[:-step] @ fitted - table[step:]).abs().max())
    learned = build_embedding_position(Learned(), length, width)
    try:
        learned(nothing, positions + 1)
        refused = False
    except ConfigError:
        refused = True
    shown = range(0, min(length, 64), 2)
    return Result(
        numbers=[
            number(
                "spread", spread, "spread of products at one distance", "同一距离下内积的标准差", 2
            ),
            number(
                "shift_error",
                shift_error,
                f"error of one matrix that shifts by {step}",
                f"平移 {step} 位的单个矩阵的误差",
                2,
            ),
            number(
                "learned_refuses",
                int(refused),
                "learned table refuses the next position (1 = yes)",
                "可学习的表拒绝下一个位置（1 = 是）",
            ),
        ],
        figures=[
            Grid(
                title="Sinusoidal vectors",
                x="dimension",
                y="position",
                values=[[round(float(v), 3) for v in table[i, :64]] for i in shown],
                y_labels=[str(i) if i % 8 == 0 else "" for i in shown],
            ),
            Lines(
                title="Product of two positions by distance",
                x="distance in tokens",
                y="product, 1 at distance 0",
                lines={
                    "PE(t)·PE(t+k)": [
                        (float(k), float(products[0, k]))
                        for k in range(0, length, max(1, length // 256))
                    ]
                },
            ),
        ],
        claims=[
            claim(
                (
                    "Vaswani et al. (arXiv 1706.03762, section 3.5): PE(t + k) is a linear "
                    "function of PE(t); PE(t)·PE(t + k) = Σ cos(k ω_i) depends on k alone.",
                    "Vaswani 等（arXiv 1706.03762，3.5 节）：PE(t + k) 是 PE(t) 的线性函数；"
                    "PE(t)·PE(t + k) = Σ cos(k ω_i) 只依赖于 k。",
                ),
                (
                    f"Products of one distance differ by {spread:.0e}; one matrix shifts all "
                    f"positions by {step} with an error of {shift_error:.0e}; a learned table of "
                    f"{length} positions {'refuses' if refused else 'accepts'} position {length}.",
                    f"同一距离的内积相差 {spread:.0e}；一个矩阵可把所有位置平移 {step} 位，误差为 "
                    f"{shift_error:.0e}；{length} 个位置的可学习表"
                    f"{'拒绝' if refused else '接受'}位置 {length}。",
                ),
                "reproduced" if spread < 1e-4 and shift_error < 1e-2 and refused else "not",
            )
        ],
    )


LAB = Lab(
    name="sinusoidal",
    rows=(9, 10),
    chapter="positions",
    title=Text("Absolute positions: learned and sinusoidal", "绝对位置：可学习与正弦"),
    seconds=3,
    parameters=Parameters,
    run=run,
)
