"""RMSNorm and LayerNorm: equal for inputs of mean zero, and only for those."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.nn.config import LayerNormConfig, RMSNormConfig
from easyllm.nn.norm import LayerNorm, RMSNorm


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"rows": 8}

    width: PositiveInt = Field(default=256, ge=4, le=8192, description="Width of the vectors.")
    rows: PositiveInt = Field(default=64, le=4096, description="Number of vectors.")


@torch.no_grad()
def run(parameters: Parameters) -> Result:
    """Compares both norms on vectors whose mean is moved away from zero."""
    width = parameters.width
    rms = RMSNorm(RMSNormConfig(eps=1e-12), width).double()
    layer = LayerNorm(LayerNormConfig(eps=1e-12, bias=False), width).double()
    rms.reset_parameters()
    layer.reset_parameters()
    generator = torch.Generator().manual_seed(parameters.seed)
    x = torch.randn(parameters.rows, width, generator=generator, dtype=torch.float64)
    x = x - x.mean(-1, keepdim=True)
    x = x / x.square().mean(-1, keepdim=True).sqrt()

    def difference(mean: float) -> float:
        moved = x + mean
        return float((rms(moved) - layer(moved)).square().mean().sqrt())

    means = [i / 10 for i in range(31)]
    at_zero, at_one = difference(0.0), difference(1.0)
    scaled = float((rms(1000 * x) - rms(x)).abs().max())
    shifted = float((layer(x + 5) - layer(x)).abs().max())
    rms_shifted = float((rms(x + 5) - rms(x)).abs().max())
    rms_size = [(m, float(rms(x + m).square().mean().sqrt())) for m in means]
    centred = [
        (m, float((rms(x + m) - rms(x + m).mean(-1, keepdim=True)).square().mean().sqrt()))
        for m in means
    ]
    return Result(
        numbers=[
            number("at_zero", at_zero, "difference of the norms, mean 0", "均值为 0 时两者之差", 2),
            number(
                "at_one",
                at_one,
                "difference, mean of one standard deviation",
                "均值为一个标准差时两者之差",
            ),
            number(
                "scaled",
                scaled,
                "change of RMSNorm when x is scaled by 1,000",
                "x 放大 1,000 倍时 RMSNorm 的变化",
                2,
            ),
            number(
                "layer_shifted",
                shifted,
                "change of LayerNorm when x is shifted by 5",
                "x 平移 5 时 LayerNorm 的变化",
                2,
            ),
            number(
                "rms_shifted",
                rms_shifted,
                "change of RMSNorm when x is shifted by 5",
                "x 平移 5 时 RMSNorm 的变化",
            ),
        ],
        figures=[
            Lines(
                title="RMSNorm and LayerNorm differ with the mean",
                x="mean of the input, in standard deviations",
                y="root mean square",
                lines={
                    "RMSNorm(x) − LayerNorm(x)": [(m, difference(m)) for m in means],
                    "RMSNorm(x)": rms_size,
                    "RMSNorm(x) less its mean": centred,
                },
            ),
        ],
        claims=[
            claim(
                (
                    "The reading list: RMSNorm is LayerNorm with mean 0.",
                    "阅读列表：RMSNorm 就是均值为 0 的 LayerNorm。",
                ),
                (
                    f"They differ by {at_zero:.0e} if the input's mean is 0 and by {at_one:.2f} if "
                    "it is one standard deviation: they are equal for inputs of mean zero only.",
                    f"输入均值为 0 时相差 {at_zero:.0e}，均值为一个标准差时相差 {at_one:.2f}："
                    "只有零均值输入时两者相等。",
                ),
                "direction" if at_zero < 1e-9 and at_one > 0.1 else "not",
                (
                    "Only for inputs of mean zero; RMSNorm does not subtract the mean of others.",
                    "仅限零均值输入；对其他输入，RMSNorm 不减去均值。",
                ),
            ),
            claim(
                (
                    "The paper (arXiv 1910.07467): RMSNorm is invariant to scaling, not to shifts.",
                    "论文（arXiv 1910.07467）：RMSNorm 对缩放不变，对平移不是。",
                ),
                (
                    f"Scaling by 1,000 changes it by {scaled:.0e}, a shift by {rms_shifted:.2f} "
                    f"(LayerNorm: {shifted:.0e}).",
                    f"放大 1,000 倍变化 {scaled:.0e}，平移变化 {rms_shifted:.2f}"
                    f"（LayerNorm：{shifted:.0e}）。",
                ),
                "reproduced" if scaled < 1e-9 and shifted < 1e-9 < rms_shifted else "not",
            ),
        ],
    )


LAB = Lab(
    name="rmsnorm",
    rows=(24,),
    chapter="costs",
    title=Text("RMSNorm and LayerNorm", "RMSNorm 与 LayerNorm"),
    seconds=2,
    parameters=Parameters,
    run=run,
)
