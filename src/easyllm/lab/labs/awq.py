"""AWQ: scaling the columns of large activations before rounding."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Bars, Lab, LabConfig, Result, Text, claim, number
from easyllm.nn.config import RMSNormConfig
from easyllm.nn.linear import Linear
from easyllm.nn.norm import RMSNorm
from easyllm.quant.awq import clipped, find_factors
from easyllm.quant.rtn import rtn
from easyllm.quant.scaling import ScaleGroup
from easyllm.quant.spec import QuantSpec
from easyllm.quant.statistics import Statistics, output_error


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"width": 64, "tokens": 64}

    width: PositiveInt = Field(default=256, multiple_of=64, le=4096, description="Inputs.")
    tokens: PositiveInt = Field(default=512, le=8192, description="Calibration rows.")
    large: PositiveFloat = Field(default=8.0, le=1000, description="Size of large channels.")
    share: float = Field(default=0.02, ge=0, le=1, description="Share of large channels.")


@torch.no_grad()
def run(parameters: Parameters) -> Result:
    """Quantizes a linear with and without factors, for inputs with a few large channels."""
    generator = torch.Generator().manual_seed(parameters.seed)
    width = parameters.width
    linear = Linear(width, width)
    linear.weight.copy_(torch.randn(width, width, generator=generator) * 0.05)
    norm = RMSNorm(RMSNormConfig(), width)
    sizes = torch.ones(width)
    count = max(1, round(parameters.share * width))
    sizes[torch.randperm(width, generator=generator)[:count]] = parameters.large
    statistics, held_out = (Statistics.empty(width) for _ in range(2))
    statistics.add(torch.randn(parameters.tokens, width, generator=generator) * sizes)
    held_out.add(torch.randn(parameters.tokens, width, generator=generator) * sizes)
    assert statistics.gram is not None
    assert held_out.gram is not None
    group = ScaleGroup(name="norm", source=norm, linears={"linear": linear})
    weight = linear.weight.float()
    total = float(output_error(weight, held_out.gram))
    found: dict[str, list[float]] = {"RTN": [], "AWQ": [], "AWQ with clipping": []}
    exponents, never_worse = {}, True
    for bits in (2, 3, 4):
        spec = QuantSpec(bits=bits, group_size=64, symmetric=False)
        scaling = find_factors(group, [statistics], spec)
        exponents[bits] = scaling.exponent
        never_worse &= scaling.error <= scaling.rtn_error
        columns = group.spread(scaling.factors)
        divided = statistics.divided(columns).gram
        assert divided is not None
        candidates = {
            "RTN": rtn(weight, spec).dequantize(),
            "AWQ": rtn(weight * columns, spec).dequantize() / columns,
            "AWQ with clipping": clipped(weight * columns, divided, spec).dequantize() / columns,
        }
        for name, values in candidates.items():
            found[name].append(float(output_error(values - weight, held_out.gram)) / total)
    three = {name: errors[1] for name, errors in found.items()}
    return Result(
        numbers=[
            *(
                number(
                    f"error_{name.replace(' ', '_').lower()}_{bits}",
                    errors[i],
                    f"held-out relative error, {name}, {bits} bits",
                    f"留出集相对误差，{_ZH[name]}，{bits} 位",
                )
                for name, errors in found.items()
                for i, bits in enumerate((2, 3, 4))
            ),
            *(
                number(
                    f"exponent_{bits}",
                    r,
                    f"exponent r found, {bits} bits",
                    f"找到的指数 r，{bits} 位",
                )
                for bits, r in exponents.items()
            ),
        ],
        figures=[
            Bars(
                title=f"{count} of {width} channels are {parameters.large:g} times larger",
                x="bits",
                y="held-out relative error of the output",
                groups=["2", "3", "4"],
                series=found,
                log_y=True,
            )
        ],
        claims=[
            claim(
                (
                    "AWQ (arXiv 2306.00978): a few weights matter most, those of large "
                    "activations; factors a^r per input, with r searched on calibration text, "
                    "protect them (OPT-6.7B, INT3-g128: perplexity 23.54 by RTN, 11.39 with 1% of "
                    "the channels in fp16).",
                    "AWQ（arXiv 2306.00978）：少数对应大激活的权重最重要；每个输入乘以 a^r，"
                    "r 在校准文本上搜索，可保护它们（OPT-6.7B，INT3-g128：RTN 困惑度 23.54，"
                    "1% 通道保留 fp16 时 11.39）。",
                ),
                (
                    f"At 3 bits the held-out error falls from {three['RTN']:.4f} to "
                    f"{three['AWQ']:.4f}, with clipping to {three['AWQ with clipping']:.4f}; on "
                    f"calibration rows it is never above RTN's: {never_worse}.",
                    f"3 位时留出集误差从 {three['RTN']:.4f} 降到 {three['AWQ']:.4f}，加裁剪为 "
                    f"{three['AWQ with clipping']:.4f}；校准行上从不高于 RTN："
                    f"{'是' if never_worse else '否'}。",
                ),
                "direction" if never_worse and three["AWQ"] < three["RTN"] else "not",
                (
                    "One linear with synthetic inputs; the paper measures perplexity.",
                    "一个线性层与合成输入；论文测量的是困惑度。",
                ),
            )
        ],
    )


_ZH = {"RTN": "RTN", "AWQ": "AWQ", "AWQ with clipping": "AWQ 加裁剪"}

LAB = Lab(
    name="awq",
    rows=(68,),
    chapter="quantization",
    title=Text("AWQ: protect what large activations meet", "AWQ：保护与大激活相乘的权重"),
    seconds=10,
    parameters=Parameters,
    run=run,
)
