"""Number formats against PyTorch's casts: every pattern of 16 and 8 bits, a million fp32 values."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.ops.number_formats import (
    FORMATS,
    FloatFormat,
    decode_array,
    encode,
    encode_array,
    find_format,
)

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8e4m3": torch.float8_e4m3fn,
    "fp8e5m2": torch.float8_e5m2,
}
FLOATS = [name for name, format in FORMATS.items() if isinstance(format, FloatFormat)]
STORED = {8: (np.uint8, torch.uint8), 16: (np.uint16, torch.int16)}


def bits_of(values):
    """Returns the patterns of a torch tensor."""
    numpy_type, torch_type = STORED[8 * values.element_size()]
    return values.view(torch_type).numpy().view(numpy_type).astype(np.uint64)


def every_pattern(name):
    """Returns all patterns of a format, and PyTorch's fp64 values of them."""
    numpy_type, torch_type = STORED[find_format(name).bits]
    patterns = np.arange(2 ** find_format(name).bits, dtype=numpy_type)
    values = torch.from_numpy(patterns.view(f"i{numpy_type().itemsize}")).view(torch_type)
    return patterns, values.view(DTYPES[name]).double().numpy()


def random_fp32(count):
    """Returns fp32 values of uniformly distributed bits, without NaN."""
    bits = np.random.default_rng(0).integers(0, 2**32, count, dtype=np.uint32)
    values = bits.view(np.float32)
    return values[~np.isnan(values)]


@pytest.mark.parametrize("name", DTYPES)
def test_every_pattern_has_pytorchs_value_and_is_encoded_as_itself(name):
    patterns, values = every_pattern(name)
    ours = decode_array(patterns, find_format(name))
    np.testing.assert_array_equal(ours, values)
    numbers = ~np.isnan(values)
    for rounding in ("nearest", "truncate"):
        again = encode_array(values, find_format(name), rounding)
        np.testing.assert_array_equal(again[numbers], patterns[numbers])
    assert np.isnan(decode_array(again[~numbers], find_format(name))).all()


@pytest.mark.parametrize("name", DTYPES)
def test_a_million_random_values_are_rounded_as_pytorch_rounds(name):
    values = random_fp32(10**6)
    generator = np.random.default_rng(1)
    powers = 2.0 ** generator.uniform(-30, 20, 10**5)  # within the ranges of the narrow formats
    within = (powers * generator.choice([-1, 1], 10**5)).astype(np.float32)
    for sample in (values, within):
        expected = torch.from_numpy(sample).to(DTYPES[name])
        ours = decode_array(encode_array(sample, find_format(name)), find_format(name))
        np.testing.assert_array_equal(ours, expected.double().numpy())
        if name in ("bf16", "fp16"):
            np.testing.assert_array_equal(
                encode_array(sample, find_format(name)), bits_of(expected)
            )


def test_truncation_to_bf16_is_the_upper_half_of_the_bits():
    values = random_fp32(10**6)
    expected = (values.view(np.uint32) >> 16).astype(np.uint64)
    np.testing.assert_array_equal(encode_array(values, find_format("bf16"), "truncate"), expected)


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32", "fp64"])
def test_limits_equal_finfo(name):
    dtype = {"fp32": torch.float32, "fp64": torch.float64, **DTYPES}[name]
    format, info = find_format(name), torch.finfo(dtype)
    assert float(format.max) == info.max
    assert float(format.smallest_normal) == info.tiny
    assert float(format.epsilon) == info.eps


def test_published_limits():
    assert FORMATS["fp16"].max == 65504
    assert FORMATS["fp16"].smallest_normal == Fraction(1, 2**14)
    assert FORMATS["fp16"].smallest == Fraction(1, 2**24)
    assert float(FORMATS["bf16"].max) == pytest.approx(3.3895e38, rel=1e-5)
    assert FORMATS["bf16"].epsilon == Fraction(1, 2**7)
    assert (FORMATS["fp8e4m3"].max, FORMATS["fp8e5m2"].max) == (448, 57344)


@pytest.mark.parametrize("name", FLOATS)
def test_single_numbers_are_stored_as_arrays_are(name):
    format = find_format(name)
    if format.bits > 32:
        numbers = [0.1, -1e-310, 1e308, 5e-324]
        patterns = np.array(numbers).view(np.uint64)
    else:
        numbers = [0.1, -0.0, 1.5, -448.0, 464.0, 465.0, 65519.0, 65520.0, 1e39, 1e-46, 3e-8, 61440]
        patterns = encode_array(np.array(numbers, np.float64), format)
    for number, pattern in zip(numbers, patterns, strict=True):
        assert encode(float(number), format).pattern == pattern, number


def test_one_tenth_in_every_way_that_is_published():
    tenth = Fraction("0.1")
    nearest, cut = (
        encode(tenth, find_format("bf16"), rounding=mode) for mode in ("nearest", "truncate")
    )
    assert (nearest.hex, nearest.value) == ("0x3DCD", 0.10009765625)
    assert (cut.hex, cut.value) == ("0x3DCC", 0.099609375)
    assert encode(tenth, find_format("fp16")).value == pytest.approx(0.0999755859, abs=1e-10)
    assert nearest.fields == ("0", "01111011", "1001101")


STATUSES = {
    "overflow": (70000, "fp16", math.inf),
    "saturated without infinity": (500, "fp8e4m3", 448.0),
    "underflow": (Fraction(1, 2**30), "fp16", 0.0),
    "subnormal": (Fraction(3, 2**25), "fp16", 2.0**-23),  # a tie, to the even mantissa
    "exact": (Fraction(3, 4), "fp8e5m2", 0.75),
    "saturated": (1000, "int8", 127.0),
    "rounded": (Fraction("2.5"), "int4", 2.0),
}


@pytest.mark.parametrize("name", STATUSES)
def test_what_happened_to_a_number_is_named(name):
    number, format, value = STATUSES[name]
    found = encode(Fraction(number), find_format(format))
    assert found.status == name.split()[0]
    assert found.value == value


def test_truncation_never_overflows():
    found = encode(Fraction(10) ** 40, find_format("fp16"), rounding="truncate")
    assert (found.value, found.status) == (65504.0, "saturated")


def test_integers_have_a_scale():
    found = encode(Fraction("2.7"), find_format("int8"), scale=Fraction(6, 127))
    assert found.pattern == 57  # 2.7 / (6 / 127) = 57.15
    assert encode(Fraction(-3), find_format("int8")).hex == "0xFD"


def test_an_unknown_format_is_refused_with_a_near_name():
    with pytest.raises(ConfigError, match="did you mean 'bf16'"):
        find_format("bf61")
    assert encode(math.inf, find_format("fp8e4m3")).value == 448  # as PyTorch 2.13
    with pytest.raises(ConfigError, match="cannot hold"):
        encode(math.inf, find_format("int8"))
