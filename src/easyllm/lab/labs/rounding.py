"""Rounding weights: bits, groups, and why one outlier spoils 8-bit activations."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Bars, Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.quant.llm_int8 import quantize_int8
from easyllm.quant.rtn import rtn
from easyllm.quant.spec import QuantSpec

GROUPS = (16, 32, 64, 128, 256)


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"rows": 32, "tokens": 8}

    rows: PositiveInt = Field(default=256, ge=8, le=4096, description="Rows of the weight.")
    columns: PositiveInt = Field(default=512, multiple_of=256, le=8192, description="Columns.")
    tokens: PositiveInt = Field(default=64, le=1024, description="Rows of activations.")
    outlier: PositiveFloat = Field(default=60.0, le=10_000, description="Size of the outliers.")


@torch.no_grad()
def run(parameters: Parameters) -> Result:
    """Rounds a weight to several grids, and multiplies activations that have outliers."""
    generator = torch.Generator().manual_seed(parameters.seed)
    shape = (parameters.rows, parameters.columns)
    weight = torch.randn(shape, generator=generator) * 0.05
    curves: dict[str, list[tuple[float, float]]] = {}
    beyond = 0.0
    for bits in (2, 3, 4, 8):
        points = []
        for size in GROUPS:
            spec = QuantSpec(bits=bits, group_size=size, symmetric=False, scale_dtype="float32")
            found = rtn(weight, spec)
            difference = (found.dequantize() - weight).abs()
            step = found.scales.repeat_interleave(size, dim=1)
            beyond = max(beyond, float((difference / (step / 2)).max()))
            points.append((spec.bits_per_weight(shape[1]), _relative(weight, found.dequantize())))
        curves[f"{bits} bits"] = points
    spec = QuantSpec(bits=4, group_size=128)
    x = torch.randn(parameters.tokens, shape[1], generator=generator)
    quantized = quantize_int8(weight)
    token, block = (QuantSpec(bits=8, group_size=g, scale_dtype="float32") for g in (None, 32))
    errors: dict[str, dict[str, float]] = {}
    for name, reach in (("no outliers", 0.0), ("outliers", parameters.outlier)):
        inputs = x.clone()
        if reach:
            inputs[:, :3] += reach * torch.sign(x[:, :3])
        # the weight is rounded in all of them, so that only the activations' rounding is compared
        dense = quantized.dense().float()
        found_by = {
            "one scale per token": rtn(inputs, token).dequantize() @ dense.T,
            "groups of 32": rtn(inputs, block).dequantize() @ dense.T,
            "LLM.int8": quantized.linear(inputs),
        }
        signal = (x @ dense.T).square().sum()
        errors[name] = {
            which: float((output - inputs @ dense.T).square().sum() / signal)
            for which, output in found_by.items()
        }
    worse = errors["outliers"]["one scale per token"] / errors["outliers"]["LLM.int8"]
    return Result(
        numbers=[
            number(
                "beyond",
                beyond,
                "largest error / half a step (4 grids, 5 group sizes)",
                "最大误差 / 半步（4 种位宽、5 种分组）",
                5,
            ),
            number(
                "bits_g128",
                spec.bits_per_weight(shape[1]),
                "bits per weight, 4 bits, groups of 128, fp16 scales",
                "4 位、分组 128、fp16 缩放系数的比特/权重",
                5,
            ),
            *(
                number(
                    f"error_{name} {which}".replace(" ", "_").lower(),
                    value,
                    f"square error of rounded activations, {which}, {name}",
                    f"激活舍入的平方误差，{_ZH[which]}，"
                    f"{'有离群值' if name == 'outliers' else '无离群值'}",
                )
                for name, each in errors.items()
                for which, value in each.items()
            ),
        ],
        figures=[
            Lines(
                title="Round to nearest: groups of 16 to 256",
                x="bits per weight, scales included",
                y="relative square error",
                lines=curves,
                log_y=True,
                marks=True,
            ),
            Bars(
                title=f"8-bit activations, three channels of ±{parameters.outlier:g}",
                x="activations",
                y="square error / square of the other channels",
                groups=list(errors),
                series={which: [each[which] for each in errors.values()] for which in _ZH},
                log_y=True,
            ),
        ],
        claims=[
            claim(
                (
                    "Rounding errs by half a step at most; 4 bits in groups of 128 with fp16 "
                    "scales take 4.125 bits. LLM.int8 (arXiv 2208.07339): inputs above 6.0 are "
                    "multiplied in full precision, since outliers ruin the scale of all others.",
                    "舍入误差至多半步；4 位、分组 128、fp16 缩放系数为 4.125 比特。"
                    "LLM.int8（arXiv 2208.07339）：超过 6.0 的输入用全精度相乘，"
                    "因为离群值会破坏其他值的缩放系数。",
                ),
                (
                    f"At most {beyond:.4f} of half a step; {spec.bits_per_weight(shape[1]):g} "
                    f"bits; with outliers one scale per token errs {worse:,.0f} times as much as "
                    "LLM.int8.",
                    f"至多为半步的 {beyond:.4f}；{spec.bits_per_weight(shape[1]):g} 比特；"
                    f"有离群值时每词元一个缩放系数的误差是 LLM.int8 的 {worse:,.0f} 倍。",
                ),
                "reproduced" if beyond < 1.001 and worse > 5 else "direction",
            )
        ],
    )


def _relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - expected).square().sum() / expected.square().sum())


_ZH = {
    "one scale per token": "每词元一个缩放系数",
    "groups of 32": "分组 32",
    "LLM.int8": "LLM.int8",
}

LAB = Lab(
    name="rounding",
    rows=(67,),
    chapter="quantization",
    title=Text("Rounding weights and activations", "权重与激活的舍入"),
    seconds=4,
    parameters=Parameters,
    run=run,
)
