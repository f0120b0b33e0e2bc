"""NF4: sixteen values for weights that are normally distributed, and what they cost in bits."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Bars, Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.ops.blockwise4 import codebook, dequantize, packed_bytes
from easyllm.quant.blockwise4 import quantize_blockwise4
from easyllm.quant.rtn import rtn
from easyllm.quant.spec import QuantSpec

CPU = torch.device("cpu")


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"rows": 64}

    rows: PositiveInt = Field(default=512, ge=16, le=8192, description="Rows of the weight.")
    columns: PositiveInt = Field(
        default=1024, multiple_of=64, le=8192, description="Columns of the weight."
    )


def run(parameters: Parameters) -> Result:
    """Quantizes weights of three distributions to NF4, FP4 and INT4 in blocks of 64."""
    generator = torch.Generator().manual_seed(parameters.seed)
    shape = (parameters.rows, parameters.columns)
    normal = torch.randn(shape, generator=generator)
    weights = {
        "normal": normal,
        "uniform": torch.rand(shape, generator=generator) * 2 - 1,
        "normal with outliers": torch.where(
            torch.rand(shape, generator=generator) < 0.01, 10 * normal, normal
        ),
    }
    errors = {
        "NF4": [
            _relative(w, dequantize(quantize_blockwise4(w, "nf4", nested=False)))
            for w in weights.values()
        ],
        "FP4": [
            _relative(w, dequantize(quantize_blockwise4(w, "fp4", nested=False)))
            for w in weights.values()
        ],
        "INT4": [
            _relative(w, rtn(w, QuantSpec(bits=4, group_size=64)).dequantize())
            for w in weights.values()
        ],
    }
    nested = _relative(normal, dequantize(quantize_blockwise4(normal, "nf4", nested=True)))
    size = 4096 * 4096
    bits = {n: packed_bytes(4096, 4096, nested=n) * 8 / size - 4 for n in (False, True)}
    saved = (0.5 - 0.126953125) * 65e9 / 8 / 1e9
    nf4, fp4 = codebook("nf4", CPU).tolist(), sorted(codebook("fp4", CPU).tolist())
    on_normal = {name: values[0] for name, values in errors.items()}
    return Result(
        numbers=[
            *(
                number(
                    f"{name.lower()}_normal",
                    value,
                    f"relative square error of {name}, normal",
                    f"{name} 的相对平方误差，正态",
                )
                for name, value in on_normal.items()
            ),
            number("nested_normal", nested, "NF4 with double quantization", "NF4 加双重量化"),
            number(
                "bits_plain",
                bits[False],
                "bits per weight of the scales (fp32, blocks of 64)",
                "缩放系数占的比特/权重（fp32，块长 64）",
            ),
            number("bits_nested", bits[True], "with double quantization", "双重量化后"),
            number("saved_65b", saved, "saved for 65B parameters, GB", "65B 参数节省的 GB"),
        ],
        figures=[
            Lines(
                title="The sixteen values",
                x="code, in order",
                y="value",
                lines={
                    "NF4": [(float(i), v) for i, v in enumerate(sorted(nf4))],
                    "FP4": [(float(i), v) for i, v in enumerate(fp4)],
                    "INT4": [(float(i), (i - 8) / 8) for i in range(16)],
                },
                marks=True,
            ),
            Bars(
                title="Relative square error, blocks of 64",
                x="distribution of the weights",
                y="error",
                groups=list(weights),
                series=errors,
            ),
        ],
        claims=[
            claim(
                (
                    "QLoRA (arXiv 2305.14314): NF4 has the smallest error for normally "
                    "distributed weights; double quantization takes the constants from 0.5 to "
                    "0.127 bits per parameter, 3 GB for 65B.",
                    "QLoRA（arXiv 2305.14314）：对正态分布的权重 NF4 误差最小；"
                    "双重量化使常数从每参数 0.5 比特降到 0.127 比特，65B 时节省 3 GB。",
                ),
                (
                    f"Error {on_normal['NF4']:.4f} for NF4, {on_normal['INT4']:.4f} for INT4 and "
                    f"{on_normal['FP4']:.4f} for FP4; {bits[False]:.3f} and {bits[True]:.4f} bits; "
                    f"{saved:.2f} GB.",
                    f"NF4 误差 {on_normal['NF4']:.4f}，INT4 为 {on_normal['INT4']:.4f}，FP4 为 "
                    f"{on_normal['FP4']:.4f}；{bits[False]:.3f} 与 {bits[True]:.4f} 比特；"
                    f"{saved:.2f} GB。",
                ),
                "reproduced"
                if on_normal["NF4"] < min(on_normal["INT4"], on_normal["FP4"])
                and abs(bits[True] - 0.126953125) < 1e-4
                else "direction",
            )
        ],
    )


def _relative(weight: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - weight).square().sum() / weight.square().sum())


LAB = Lab(
    name="nf4",
    rows=(42,),
    chapter="training",
    title=Text("NF4, the data type of QLoRA", "QLoRA 的数据类型 NF4"),
    seconds=4,
    parameters=Parameters,
    run=run,
)
