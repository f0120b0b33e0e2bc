"""fp32, fp16, bf16 and fp8: range and precision, truncation and rounding, and what overflows."""

import math
from typing import ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.models.describe import describe
from easyllm.ops.number_formats import (
    FloatFormat,
    Rounding,
    decode_array,
    encode,
    encode_array,
    find_format,
)
from easyllm.plan.parameters import count_parameters

Floats: TypeAlias = NDArray[np.float64]
NAMES = ("fp32", "fp16", "bf16", "fp8e4m3", "fp8e5m2")


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"values": 500}

    values: PositiveInt = Field(
        default=20_000, ge=100, le=1_000_000, description="Random values to cast."
    )
    number: float = Field(default=0.1, gt=-1e30, lt=1e30, description="Number to encode.")


def run(parameters: Parameters) -> Result:
    """Casts a number and random values to each format, truncated and rounded to nearest."""
    formats = {name: _float(name) for name in NAMES}
    bf16, fp16 = formats["bf16"], formats["fp16"]
    cut = encode(parameters.number, bf16, rounding="truncate")
    near = encode(parameters.number, bf16)
    half = encode(parameters.number, fp16)
    random = np.random.default_rng(parameters.seed)
    exponents = random.uniform(-45, 45, parameters.values)
    values = random.uniform(1, 2, parameters.values) * 2.0**exponents
    lost = {name: _lost(values, each) for name, each in formats.items()}
    ratio = _error(values, bf16, "truncate") / _error(values, bf16, "nearest")
    patterns = np.arange(1 << 16, dtype=np.uint64)
    numbers = decode_array(patterns, bf16)
    finite = np.isfinite(numbers)
    again = encode_array(numbers[finite], bf16)
    changed = int((again != patterns[finite]).sum())
    sizes = {
        bits: count_parameters(describe("llama2-7b")).total * bits / 8e9 for bits in (32, 16, 8, 4)
    }
    grid = [2.0 ** (e / 4) for e in range(-30 * 4, 30 * 4 + 1)]
    curves = {name: _errors(grid, formats[name]) for name in NAMES[1:]}
    as_published = (cut.hex, near.hex) == ("0x3DCC", "0x3DCD")
    return Result(
        numbers=[
            number("fp16_max", float(fp16.max), "largest fp16", "fp16 最大值", 7),
            number("fp16_smallest", float(fp16.smallest), "smallest fp16", "fp16 最小正数"),
            number("bf16_max", float(bf16.max), "largest bf16", "bf16 最大值", 5),
            number(
                "bf16_epsilon",
                float(bf16.epsilon),
                "bf16: distance from 1 to the next number",
                "bf16：1 到下一个数的距离",
            ),
            number(
                "truncated",
                cut.value,
                f"{parameters.number:g} in bf16, truncated ({cut.hex})",
                f"{parameters.number:g} 的 bf16，截断（{cut.hex}）",
                10,
            ),
            number(
                "nearest",
                near.value,
                f"in bf16, to nearest ({near.hex})",
                f"bf16，就近舍入（{near.hex}）",
                10,
            ),
            number(
                "half",
                half.value,
                f"in fp16, to nearest ({half.hex})",
                f"fp16，就近舍入（{half.hex}）",
                10,
            ),
            number(
                "truncation_ratio",
                ratio,
                "root mean square error, truncated / nearest, bf16",
                "均方根误差，截断 / 就近，bf16",
            ),
            number(
                "bf16_changed",
                changed,
                "bf16 patterns changed by bf16 → fp64 → bf16",
                "bf16 → fp64 → bf16 后改变的位模式数",
            ),
            *(
                number(
                    f"lost_{name}",
                    share,
                    f"share of values from 2⁻⁴⁵ to 2⁴⁵ lost in {name}",
                    f"2⁻⁴⁵ 到 2⁴⁵ 的值在 {name} 中丢失的比例",
                )
                for name, share in lost.items()
            ),
            *(
                number(
                    f"gb_{bits}",
                    size,
                    f"weights of Llama-2-7B in {bits} bits, GB",
                    f"Llama-2-7B 的权重，{bits} 位，GB",
                )
                for bits, size in sizes.items()
            ),
        ],
        figures=[
            Lines(
                title="Largest relative error near a value",
                x="value",
                y="relative error",
                lines=curves,
                log_x=True,
                log_y=True,
            ),
        ],
        claims=[
            claim(
                (
                    "The reading list: to convert fp32 to fp16, drop the last mantissa bits and "
                    "change the exponent by −127 + 15.",
                    "阅读列表：fp32 转 fp16 时，尾数位直接去掉，指数位 −127 + 15。",
                ),
                (
                    f"Truncation gives {cut.hex} for {parameters.number:g} in bf16, PyTorch's "
                    f"rounding to nearest {near.hex}; truncation errs {ratio:.2f} times as much. "
                    f"{lost['fp16']:.0%} of values from 2⁻⁴⁵ to 2⁴⁵ overflow or vanish in fp16, "
                    f"{lost['bf16']:.0%} in bf16.",
                    f"{parameters.number:g} 的 bf16，截断得 {cut.hex}，PyTorch 的就近舍入得 "
                    f"{near.hex}；"
                    f"截断的误差是其 {ratio:.2f} 倍。2⁻⁴⁵ 到 2⁴⁵ 的值在 fp16 中有 "
                    f"{lost['fp16']:.0%} "
                    f"溢出或消失，bf16 为 {lost['bf16']:.0%}。",
                ),
                "direction" if as_published or parameters.number != 0.1 else "not",
                (
                    "Truncating is one way to convert, not PyTorch's; −127 + 15 fails for values "
                    "outside fp16's range.",
                    "截断是一种转换方式，但不是 PyTorch 的；−127 + 15 对超出 fp16 范围的值不成立。",
                ),
            )
        ],
    )


def _float(name: str) -> FloatFormat:
    found = find_format(name)
    assert isinstance(found, FloatFormat), name
    return found


def _cast(values: Floats, each: FloatFormat, rounding: Rounding) -> Floats:
    return decode_array(encode_array(values, each, rounding), each)


def _lost(values: Floats, each: FloatFormat) -> float:
    """Returns the share of values that overflow, or that become 0."""
    found = _cast(values, each, "nearest")
    over = ~np.isfinite(found) | (np.abs(values) > float(each.max))
    return float((over | (found == 0)).mean())


def _error(values: Floats, each: FloatFormat, rounding: Rounding) -> float:
    relative = _cast(values, each, rounding) / values - 1
    return math.sqrt(float(np.square(relative).mean()))


def _errors(grid: list[float], each: FloatFormat) -> list[tuple[float, float]]:
    """Returns the largest relative error of 16 numbers near each value, where it is finite."""
    found = []
    for value in grid:
        near = value * (1 + np.arange(16) / 37)
        if near.max() <= float(each.max):
            worst = float(np.abs(_cast(near, each, "nearest") / near - 1).max())
            found.append((value, worst))
    return [(x, y) for x, y in found if y > 0]


LAB = Lab(
    name="number-formats",
    rows=(18, 19),
    chapter="costs",
    title=Text("Number formats, and what a cast loses", "数值格式，以及转换的损失"),
    seconds=3,
    parameters=Parameters,
    run=run,
)
