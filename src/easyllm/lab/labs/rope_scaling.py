"""Longer contexts by other frequencies: interpolation, NTK, YaRN."""

import math
from typing import ClassVar

from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Lab, LabConfig, Lines, Number, Result, Text, claim, number
from easyllm.nn.position_config import LinearScaling, NTKScaling, Rope, YarnScaling
from easyllm.nn.rope_scaling import critical_dim, ntk_base, rope_frequencies, yarn_attention_factor


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"head_dim": 64}

    head_dim: PositiveInt = Field(
        default=128, multiple_of=2, ge=16, le=512, description="Width of a head."
    )
    theta: float = Field(default=10000.0, gt=1, description="Base of the frequencies.")
    trained: PositiveInt = Field(default=4096, ge=64, description="Trained length in tokens.")
    factor: float = Field(default=8.0, gt=1, le=128, description="Extension of the context.")


def run(parameters: Parameters) -> Result:
    """Computes bases, frequencies and attention factors of the scalings."""
    width, theta = parameters.head_dim, parameters.theta
    length, factor = parameters.trained, parameters.factor
    yarn = YarnScaling(factor=factor, original_max_seq_len=length)
    scalings = {
        "PI": LinearScaling(factor=factor),
        "NTK": NTKScaling(factor=factor),
        "YaRN": yarn,
    }
    plain, _ = rope_frequencies(Rope(theta=theta), width, length)
    found = {
        name: rope_frequencies(Rope(theta=theta, scaling=scaling), width, length)[0]
        for name, scaling in scalings.items()
    }
    ratios = {
        name: [(float(i), float(f / p)) for i, (f, p) in enumerate(zip(each, plain, strict=True))]
        for name, each in found.items()
    }
    turns = {
        name: [(float(i), float(f) * length * factor / (2 * math.pi)) for i, f in enumerate(each)]
        for name, each in {**found, "unscaled": plain}.items()
    }
    own_base, own_dims = ntk_base(theta, width, factor), critical_dim(theta, width, length)
    bases = {s: ntk_base(10000.0, 128, s) for s in (2.0, 4.0, 8.0)}
    factors = {
        s: yarn_attention_factor(YarnScaling(factor=s, original_max_seq_len=4096))
        for s in (4.0, 16.0)
    }
    dims = critical_dim(10000.0, 128, 4096)
    as_published = (
        all(
            abs(bases[s] / b - 1) < 1e-6
            for s, b in ((2.0, 20221.26), (4.0, 40889.94), (8.0, 82684.62))
        )
        and abs(factors[4.0] - 1.1386) < 1e-4
        and abs(factors[16.0] - 1.2773) < 1e-4
        and dims == 92
    )
    return Result(
        numbers=[
            *(
                number(
                    f"ntk_base_{s:g}",
                    b,
                    f"NTK base for a factor of {s:g}, d = 128",
                    f"因子 {s:g} 的 NTK 基数，d = 128",
                    7,
                )
                for s, b in bases.items()
            ),
            *(
                number(
                    f"yarn_factor_{s:g}",
                    f,
                    f"YaRN attention factor for {s:g}",
                    f"因子 {s:g} 的 YaRN 注意力系数",
                    5,
                )
                for s, f in factors.items()
            ),
            number(
                "critical_dim",
                dims,
                "critical dimension of Llama-2 (4,096 tokens)",
                "Llama-2 的临界维度（4,096 词元）",
            ),
            *_own(own_base, yarn_attention_factor(yarn), own_dims),
        ],
        figures=[
            Lines(
                title=f"Frequencies for {factor:g} times {length:,} tokens",
                x="pair of dimensions",
                y="frequency, as a share of the unscaled",
                lines=ratios,
            ),
            Lines(
                title=f"Turns of each pair over {int(length * factor):,} tokens",
                x="pair of dimensions",
                y="turns",
                lines=turns,
                log_y=True,
            ),
        ],
        claims=[
            claim(
                (
                    "The article (zhihu 675243992) and YaRN (arXiv 2309.00071): NTK sets the base "
                    "to base·s^(d/(d−2)); YaRN leaves fast pairs, interpolates slow ones, and "
                    "multiplies attention by 0.1 ln s + 1; Llama-2 trains 92 of 128 dims fully.",
                    "文章（知乎 675243992）与 YaRN（arXiv 2309.00071）：NTK 把基数改为 "
                    "base·s^(d/(d−2))；YaRN 保留快的分量、内插慢的分量，并把注意力乘以 "
                    "0.1 ln s + 1；Llama-2 的 128 维中有 92 维得到充分训练。",
                ),
                (
                    f"Bases {bases[2.0]:,.2f}, {bases[4.0]:,.2f} and {bases[8.0]:,.2f} for 2, 4 "
                    f"and 8; factors {factors[4.0]:.4f} and {factors[16.0]:.4f} for 4 and 16; "
                    f"critical dimension {dims}. With the factor {factor:g} of this run: base "
                    f"{own_base:,.2f}, factor on attention {yarn_attention_factor(yarn):.4f}.",
                    f"因子 2、4、8 的基数为 {bases[2.0]:,.2f}、{bases[4.0]:,.2f}、"
                    f"{bases[8.0]:,.2f}；"
                    f"因子 4、16 的系数为 {factors[4.0]:.4f}、{factors[16.0]:.4f}；临界维度为 "
                    f"{dims}。本次因子 {factor:g}：基数 {own_base:,.2f}，"
                    f"注意力系数 {yarn_attention_factor(yarn):.4f}。",
                ),
                "reproduced" if as_published else "not",
            )
        ],
    )


def _own(base: float, attention: float, dims: int) -> list[Number]:
    """Returns the numbers for the parameters that were given."""
    return [
        number(
            "ntk_base",
            base,
            "NTK base for these parameters (head_dim, theta, factor)",
            "按所给参数（head_dim、theta、factor）的 NTK 基数",
            7,
        ),
        number(
            "yarn_factor",
            attention,
            "YaRN attention factor for this factor",
            "按所给 factor 的 YaRN 注意力系数",
            5,
        ),
        number(
            "own_critical_dim",
            dims,
            "critical dimension for these parameters (head_dim, theta, trained)",
            "按所给参数（head_dim、theta、trained）的临界维度",
        ),
    ]


LAB = Lab(
    name="rope-scaling",
    rows=(15,),
    chapter="positions",
    title=Text("Longer contexts by other frequencies", "用其他频率扩展上下文"),
    seconds=2,
    parameters=Parameters,
    run=run,
)
