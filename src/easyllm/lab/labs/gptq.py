"""GPTQ: later columns make up for the rounding of earlier ones, if inputs are correlated."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Bars, Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.quant.gptq import GPTQOptions, gptq
from easyllm.quant.rtn import rtn
from easyllm.quant.spec import QuantSpec
from easyllm.quant.statistics import Statistics, output_error

SEARCHED = GPTQOptions()
PLAIN = GPTQOptions(act_order=False, search=False)


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"width": 64, "rows": 32}

    width: PositiveInt = Field(default=192, multiple_of=64, le=2048, description="Inputs.")
    rows: PositiveInt = Field(default=128, le=4096, description="Outputs.")
    bits: PositiveInt = Field(default=3, ge=2, le=4, description="Bits of the first figure.")


@torch.no_grad()
def run(parameters: Parameters) -> Result:
    """Quantizes a weight for inputs with more and more correlation."""
    generator = torch.Generator().manual_seed(parameters.seed)
    width = parameters.width
    weight = torch.randn(parameters.rows, width, generator=generator) * 0.05
    spec = QuantSpec.model_validate({"bits": parameters.bits, "group_size": 64})
    correlations = (0.0, 0.3, 0.6, 0.8, 0.9, 0.97)
    curves: dict[str, list[tuple[float, float]]] = {"RTN": [], "GPTQ": [], "GPTQ with search": []}
    for correlation in correlations:
        gram, held_out = (_gram(width, correlation, generator) for _ in range(2))
        for name, values in _candidates(weight, gram, spec).items():
            curves[name].append((correlation, _relative(values, weight, held_out)))
    diagonal = torch.diag(torch.rand(width, generator=generator) + 0.5)
    same = gptq(weight, diagonal, spec, PLAIN).dequantize()
    diagonal_apart = float((same - rtn(weight, spec).dequantize()).abs().max())
    gram, held_out = (_gram(width, 0.9, generator) for _ in range(2))
    by_bits: dict[str, list[float]] = {name: [] for name in curves}
    for bits in (2, 3, 4):
        each = QuantSpec.model_validate({"bits": bits, "group_size": 64})
        for name, values in _candidates(weight, gram, each).items():
            by_bits[name].append(_relative(values, weight, held_out))
    ratios = [g / r for g, r in zip(by_bits["GPTQ"], by_bits["RTN"], strict=True)]
    return Result(
        numbers=[
            number(
                "diagonal_apart",
                diagonal_apart,
                "GPTQ against RTN for a diagonal H",
                "H 为对角阵时 GPTQ 与 RTN 之差",
                2,
            ),
            *(
                number(
                    f"ratio_{bits}",
                    ratio,
                    f"error of GPTQ / RTN, {bits} bits, correlation 0.9",
                    f"GPTQ / RTN 的误差，{bits} 位，相关 0.9",
                )
                for bits, ratio in zip((2, 3, 4), ratios, strict=True)
            ),
            number(
                "ratio_uncorrelated",
                curves["GPTQ"][0][1] / curves["RTN"][0][1],
                f"the same, {parameters.bits} bits, no correlation",
                f"同上，{parameters.bits} 位，无相关",
            ),
        ],
        figures=[
            Lines(
                title=f"{parameters.bits} bits: error by the correlation of the inputs",
                x="correlation of neighbouring inputs",
                y="held-out relative error",
                lines=curves,
                log_y=True,
                marks=True,
            ),
            Bars(
                title="Correlation 0.9",
                x="bits",
                y="held-out relative error",
                groups=["2", "3", "4"],
                series=by_bits,
                log_y=True,
            ),
        ],
        claims=[
            claim(
                (
                    "GPTQ (arXiv 2210.17323): rounding a column and correcting the rest by the "
                    "inverse Hessian loses less than rounding to nearest; with a diagonal Hessian "
                    "nothing can be corrected.",
                    "GPTQ（arXiv 2210.17323）：舍入一列并用逆 Hessian 修正其余列，"
                    "损失小于就近舍入；"
                    "Hessian 为对角阵时无从修正。",
                ),
                (
                    f"With a diagonal H both are equal ({diagonal_apart:g}); at correlation 0.9 "
                    f"GPTQ's error is {ratios[0]:.2f}, {ratios[1]:.2f} and {ratios[2]:.2f} of "
                    "RTN's at 2, 3 and 4 bits.",
                    f"H 为对角阵时两者相等（{diagonal_apart:g}）；相关 0.9 时 GPTQ 的误差在 2、"
                    "3、4 位"
                    f"分别为 RTN 的 {ratios[0]:.2f}、{ratios[1]:.2f}、{ratios[2]:.2f}。",
                ),
                "reproduced" if diagonal_apart == 0 and max(ratios) < 1 else "direction",
            )
        ],
    )


def _candidates(
    weight: torch.Tensor, gram: torch.Tensor, spec: QuantSpec
) -> dict[str, torch.Tensor]:
    return {
        "RTN": rtn(weight, spec).dequantize(),
        "GPTQ": gptq(weight, gram, spec, PLAIN).dequantize(),
        "GPTQ with search": gptq(weight, gram, spec, SEARCHED).dequantize(),
    }


def _gram(width: int, correlation: float, generator: torch.Generator) -> torch.Tensor:
    """Returns Σ x xᵀ of 1,024 rows whose neighbouring inputs are correlated."""
    apart = (torch.arange(width)[:, None] - torch.arange(width)).abs()
    covariance = torch.pow(torch.tensor(correlation, dtype=torch.float64), apart)
    factor = torch.linalg.cholesky(covariance).float()
    statistics = Statistics.empty(width)
    statistics.add(torch.randn(1024, width, generator=generator) @ factor.T)
    assert statistics.gram is not None
    return statistics.gram


def _relative(values: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> float:
    return float(output_error(values - weight, gram) / output_error(weight, gram))


LAB = Lab(
    name="gptq",
    rows=(69,),
    chapter="quantization",
    title=Text("GPTQ: rounding with corrections", "GPTQ：带修正的舍入"),
    seconds=10,
    parameters=Parameters,
    run=run,
)
