"""Number formats: how a real number is stored in few bits, and what is lost.

A floating-point format of 1 sign, E exponent and M mantissa bits stores

    (-1)^s · 2^(e - bias) · (1 + m / 2^M)      0 < e < 2^E - 1       normal
    (-1)^s · 2^(1 - bias) · (m / 2^M)          e = 0                 subnormal, zero
    infinity, NaN                              e = 2^E - 1           (IEEE 754-2019, section 3.4)

fp8e4m3 uses e = 2^E - 1 for numbers, too: it has no infinity, and one NaN of each sign
(Micikevicius et al. 2022, arXiv 2209.05433, table 1). What is too large becomes the largest number
there, infinity too, as in PyTorch 2.13. Integers are two's complement, times a scale.

`encode` rounds to the nearest number, ties to an even mantissa, as PyTorch does, or truncates: then
bf16 is the upper half of fp32's bits.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from easyllm.core.errors import ConfigError, suggest

Rounding = Literal["nearest", "truncate"]
Status = Literal["exact", "rounded", "subnormal", "underflow", "overflow", "saturated", "nan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat:
    """A floating-point format.

    Attributes:
        name: its name.
        exponent_bits, mantissa_bits: E and M.
        has_infinity: whether the largest exponent is for infinity and NaN only.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    has_infinity: bool = True

    @property
    def bits(self) -> int:
        """Number of bits."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """Exponent bias, 2^(E-1) - 1."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.bias

    @property
    def max_pattern(self) -> int:
        """Bits of the largest finite number."""
        top = ((1 << self.exponent_bits) - self.has_infinity) << self.mantissa_bits
        return top - 1 - (not self.has_infinity)

    @property
    def infinity_pattern(self) -> int:
        """Bits of infinity; of the largest number in a format without infinity."""
        return self.max_pattern + self.has_infinity

    @property
    def nan_pattern(self) -> int:
        """Bits of the quiet NaN."""
        quiet = 1 << (self.mantissa_bits - 1) if self.has_infinity else 0
        return self.max_pattern + 1 + quiet

    @property
    def max(self) -> Fraction:
        """Largest finite number."""
        return self.fraction(self.max_pattern)

    @property
    def top_binade(self) -> Fraction:
        """The largest power of two."""
        return self.fraction(self.max_pattern >> self.mantissa_bits << self.mantissa_bits)

    @property
    def smallest_normal(self) -> Fraction:
        """Smallest positive normal number."""
        return Fraction(2) ** self.min_exponent

    @property
    def smallest(self) -> Fraction:
        """Smallest positive number."""
        return Fraction(2) ** (self.min_exponent - self.mantissa_bits)

    @property
    def epsilon(self) -> Fraction:
        """Distance from 1 to the next number."""
        return Fraction(1, 2**self.mantissa_bits)

    def fraction(self, pattern: int) -> Fraction:
        """Returns the number of a pattern that is neither infinity nor NaN."""
        size = pattern & (2 ** (self.bits - 1) - 1)
        field, mantissa = divmod(size, 2**self.mantissa_bits)
        whole = mantissa + (2**self.mantissa_bits if field else 0)
        power = max(field, 1) - self.bias - self.mantissa_bits
        value: Fraction = whole * Fraction(2) ** power
        return -value if pattern >> (self.bits - 1) else value

    def value(self, pattern: int) -> float:
        """Returns the number of any pattern as a Python float, which holds it exactly."""
        size = pattern & (2 ** (self.bits - 1) - 1)
        sign = -1.0 if pattern >> (self.bits - 1) else 1.0
        if size > self.max_pattern:
            is_infinite = self.has_infinity and size == self.infinity_pattern
            return sign * math.inf if is_infinite else math.nan
        return math.copysign(abs(float(self.fraction(pattern))), sign)


@dataclass(frozen=True, slots=True, kw_only=True)
class IntFormat:
    """Two's complement integers, times a scale.

    Attributes:
        name: its name.
        bits: number of bits.
    """

    name: str
    bits: int

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def value(self, pattern: int) -> float:
        """Returns the integer of a pattern."""
        return float(pattern - (pattern >> (self.bits - 1) << self.bits))


Format = FloatFormat | IntFormat


def _float(name: str, exponent: int, mantissa: int, *, infinity: bool = True) -> FloatFormat:
    return FloatFormat(
        name=name, exponent_bits=exponent, mantissa_bits=mantissa, has_infinity=infinity
    )


FORMATS: dict[str, Format] = {
    "fp64": _float("fp64", 11, 52),
    "fp32": _float("fp32", 8, 23),
    "tf32": _float("tf32", 8, 10),
    "bf16": _float("bf16", 8, 7),
    "fp16": _float("fp16", 5, 10),
    "fp8e4m3": _float("fp8e4m3", 4, 3, infinity=False),
    "fp8e5m2": _float("fp8e5m2", 5, 2),
    "int16": IntFormat(name="int16", bits=16),
    "int8": IntFormat(name="int8", bits=8),
    "int4": IntFormat(name="int4", bits=4),
}
ALIASES = {
    "float64": "fp64",
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "e4m3": "fp8e4m3",
    "e5m2": "fp8e5m2",
    "float8_e4m3fn": "fp8e4m3",
    "float8_e5m2": "fp8e5m2",
}


def find_format(name: str) -> Format:
    """Returns the format with this name (`bf16`, `bfloat16` ...).

    Raises:
        ConfigError: there is none.
    """
    key = ALIASES.get(name.lower(), name.lower())
    if key not in FORMATS:
        raise ConfigError(
            f"number format {name!r} is not known{suggest(name, [*FORMATS, *ALIASES])}; use one of "
            f"{', '.join(FORMATS)}"
        )
    return FORMATS[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A number in a format.

    Attributes:
        format: the format.
        pattern: its bits.
        value: the number that the bits stand for, times the scale of an integer format.
        error: `value` minus the number that was encoded; NaN if that is not finite.
        status: what happened to it.
    """

    format: Format
    pattern: int
    value: float
    error: float
    status: Status

    @property
    def hex(self) -> str:
        """The bits in hexadecimal, such as `0x3DCD`."""
        return f"0x{self.pattern:0{-(-self.format.bits // 4)}X}"

    @property
    def bits(self) -> str:
        """The bits, the sign first."""
        return f"{self.pattern:0{self.format.bits}b}"

    @property
    def fields(self) -> tuple[str, ...]:
        """The bits by field: sign, exponent, mantissa; an integer has one field."""
        if isinstance(self.format, IntFormat):
            return (self.bits,)
        end = 1 + self.format.exponent_bits
        return self.bits[:1], self.bits[1:end], self.bits[end:]


def encode(
    number: Fraction | float,
    format: Format,
    *,
    rounding: Rounding = "nearest",
    scale: Fraction | None = None,
) -> Encoded:
    """Returns a number as it is stored in a format; exact arithmetic, rounded once.

    Args:
        number: the number; a float may be infinite or NaN.
        format: the format.
        rounding: to the nearest number, ties to even, or toward zero.
        scale: what an integer is multiplied with; None is 1. Only for integers.

    Raises:
        ConfigError: an integer format cannot hold infinity or NaN.

    >>> encode(Fraction("0.1"), find_format("bf16")).hex
    '0x3DCD'
    """
    if isinstance(number, float) and not math.isfinite(number):
        return _not_finite(number, format)
    exact = Fraction(number)
    if isinstance(format, IntFormat):
        return _encode_int(exact, format, rounding, scale or Fraction(1))
    negative = exact < 0 or (isinstance(number, float) and math.copysign(1.0, number) < 0)
    size = abs(exact)
    exponent = max(_exponent(size), format.min_exponent) if size else format.min_exponent
    units = size / Fraction(2) ** (exponent - format.mantissa_bits)
    whole = round(units) if rounding == "nearest" else math.floor(units)
    pattern = ((exponent - format.min_exponent) << format.mantissa_bits) + whole
    status: Status = "exact" if whole == units else "rounded"
    if pattern > format.max_pattern:
        saturates = rounding == "truncate" or not format.has_infinity
        pattern = format.max_pattern if saturates else format.infinity_pattern
        status = "saturated" if saturates else "overflow"
    elif whole == 0 and size:
        status = "underflow"
    elif 0 < pattern < 1 << format.mantissa_bits:
        status = "subnormal"
    pattern |= negative << (format.bits - 1)
    value = format.value(pattern)
    error = nearest_float(Fraction(value) - exact) if math.isfinite(value) else math.nan
    return Encoded(format=format, pattern=pattern, value=value, error=error, status=status)


def _encode_int(exact: Fraction, format: IntFormat, rounding: Rounding, scale: Fraction) -> Encoded:
    units = exact / scale
    whole = round(units) if rounding == "nearest" else math.trunc(units)
    low, high = format.limits
    kept = min(max(whole, low), high)
    status: Status = "exact" if whole == units else "rounded"
    if kept != whole:
        status = "saturated"
    elif whole == 0 and exact:
        status = "underflow"
    return Encoded(
        format=format,
        pattern=kept % 2**format.bits,
        value=float(kept * scale),
        error=nearest_float(kept * scale - exact),
        status=status,
    )


def nearest_float(value: Fraction) -> float:
    """Returns the nearest float; infinity beyond the largest, where `float` raises."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _not_finite(number: float, format: Format) -> Encoded:
    if isinstance(format, IntFormat):
        raise ConfigError(f"{format.name} cannot hold {number}; give a finite number")
    pattern = format.nan_pattern if math.isnan(number) else format.infinity_pattern
    pattern |= (math.copysign(1.0, number) < 0) << (format.bits - 1)
    value = format.value(pattern)
    status: Status = "nan" if math.isnan(value) else "exact"
    if math.isfinite(value):
        status = "saturated"
    return Encoded(format=format, pattern=pattern, value=value, error=math.nan, status=status)


def _exponent(size: Fraction) -> int:
    """Returns floor(log2(size)) of a positive number."""
    guess = size.numerator.bit_length() - size.denominator.bit_length()
    return guess if Fraction(2) ** guess <= size else guess - 1


# ---- arrays


def encode_array(
    values: NDArray[np.floating], format: FloatFormat, rounding: Rounding = "nearest"
) -> NDArray[np.uint64]:
    """Returns the bits of each value, as `encode` does; for formats of at most 32 bits.

    Args:
        values: any shape, fp16, fp32 or fp64 values; products with powers of two stay exact.
        format: the format.
        rounding: as for `encode`.
    """
    assert format.bits <= 32, "the scaled values of a wider format are not exact in fp64"
    wide = np.asarray(values, np.float64)
    size = np.abs(wide)
    finite = np.isfinite(size)
    safe = np.where(finite, size, 0.0)
    _, powers = np.frexp(safe)  # safe = m · 2^powers with 0.5 <= m < 1
    exponent = np.maximum(powers.astype(np.int64) - 1, format.min_exponent)
    exponent[safe == 0] = format.min_exponent
    units = np.ldexp(safe, (format.mantissa_bits - exponent).astype(np.int32))
    whole = np.rint(units) if rounding == "nearest" else np.trunc(units)
    shifted = (exponent - format.min_exponent) << format.mantissa_bits
    pattern = (shifted + whole.astype(np.int64)).astype(np.uint64)
    top = format.max_pattern if rounding == "truncate" else format.infinity_pattern
    pattern = np.where(pattern > format.max_pattern, np.uint64(top), pattern)
    pattern = np.where(np.isinf(size), np.uint64(format.infinity_pattern), pattern)
    pattern = np.where(np.isnan(size), np.uint64(format.nan_pattern), pattern)
    sign = np.signbit(wide).astype(np.uint64) << np.uint64(format.bits - 1)
    found: NDArray[np.uint64] = pattern | sign
    return found


def decode_array(patterns: NDArray[np.unsignedinteger], format: FloatFormat) -> NDArray[np.float64]:
    """Returns the number of each pattern; for formats of at most 32 bits."""
    bits = np.asarray(patterns, np.uint64).astype(np.int64)
    size = bits & (2 ** (format.bits - 1) - 1)
    field, mantissa = size >> format.mantissa_bits, size & (2**format.mantissa_bits - 1)
    whole = mantissa + np.where(field > 0, 2**format.mantissa_bits, 0)
    power = np.maximum(field, 1) - format.bias - format.mantissa_bits
    value = np.ldexp(whole.astype(np.float64), power.astype(np.int32))
    value = np.where(size > format.max_pattern, math.nan, value)
    if format.has_infinity:
        value = np.where(size == format.infinity_pattern, math.inf, value)
    sign = np.where(bits >> (format.bits - 1) & 1, -1.0, 1.0)
    found: NDArray[np.float64] = np.copysign(value, sign)
    return found


__all__ = [
    "FORMATS",
    "Encoded",
    "FloatFormat",
    "Format",
    "IntFormat",
    "Rounding",
    "Status",
    "decode_array",
    "encode",
    "encode_array",
    "find_format",
    "nearest_float",
]
