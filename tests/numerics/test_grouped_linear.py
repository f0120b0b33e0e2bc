"""Products with weights on grids of 2 to 8 bits: the packed layout, and the C kernel."""

import pytest
import torch

from easyllm.ops.grouped_linear import (
    BITS,
    MINIMA,
    NONE,
    ZEROS,
    Grid,
    pack,
    unsupported_reason,
)
from easyllm.ops.kernels import kernels_for
from easyllm.ops.packed_linear import packed_linear, reference_packed_linear
from easyllm.ops.quantized_linear import quantize_rows

SHAPES = [(8, 32), (24, 64), (20, 96), (64, 320), (7, 128)]


def matrix_of(bits, shift, dtype, outputs, inputs, group=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (outputs, inputs), generator=generator).to(torch.uint8)
    groups = -(-inputs // group)
    scales = torch.rand(outputs, groups, generator=generator) * 0.1 + 0.01
    scales = scales.to(dtype).float()
    shifts = None
    if shift == ZEROS:
        shifts = torch.randint(0, 1 << bits, (outputs, groups), generator=generator)
    elif shift == MINIMA:
        shifts = torch.randn(outputs, groups, generator=generator).half().float()
    grid = Grid(bits=bits, scale_dtype=dtype, shift=shift, group_size=group)
    return pack(codes, scales, shifts, grid), codes, scales, shifts


def plain(codes, scales, shifts, grid):
    index = torch.arange(codes.shape[1]) // grid.group_size
    scale = scales[:, index]
    if grid.shift == MINIMA:
        return codes.double() * scale.double() + shifts[:, index].double()
    shift = (1 << (grid.bits - 1)) if shifts is None else shifts[:, index].double()
    return (codes.double() - shift) * scale.double()


@pytest.mark.parametrize("bits", BITS)
def test_rows_too_small_to_be_rounded_count_as_zeros(bits):
    matrix, *_ = matrix_of(bits, NONE, torch.bfloat16, 8, 64)
    x = torch.full((2, 64), 1e-38)
    x[1, 0] = 1.0  # the other group of this row is too small
    y = packed_linear(x, matrix)
    if kernels_for(x) is not None:
        assert torch.equal(y[0], torch.zeros(8))
    torch.testing.assert_close(y, reference_packed_linear(x, matrix), atol=1e-2, rtol=1e-2)


def test_rows_of_another_length_are_refused():
    matrix, *_ = matrix_of(4, NONE, torch.bfloat16, 8, 64)
    with pytest.raises(ValueError, match="rows of 96 values, expected 64"):
        packed_linear(torch.zeros(2, 96), matrix)


@pytest.mark.parametrize("group", [32, 64, 10_000])
@pytest.mark.parametrize("shift", [NONE, ZEROS, MINIMA])
@pytest.mark.parametrize("bits", BITS)
def test_packing_is_undone_by_unpacking(bits, shift, group):
    for outputs, inputs in SHAPES:
        if group == 64 and inputs % 64:
            continue
        dtype = torch.float16 if shift == MINIMA else torch.bfloat16
        size = min(group, inputs)
        matrix, codes, scales, shifts = matrix_of(bits, shift, dtype, outputs, inputs, size)
        assert matrix.data.shape == (-(-outputs // 8), matrix.grid.row_bytes(inputs))
        found = matrix.unpack()
        assert torch.equal(found[0], codes)
        assert torch.equal(found[1], scales)
        if shifts is not None:
            assert torch.equal(found[2], shifts.float())
        expected = plain(codes, scales, shifts, matrix.grid)
        torch.testing.assert_close(matrix.dequantize().double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(matrix.dequantize(0, 3), matrix.dequantize()[:3])


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 33])
@pytest.mark.parametrize("shift", [NONE, ZEROS, MINIMA])
@pytest.mark.parametrize("bits", BITS)
def test_the_kernel_is_exact_for_quantized_rows(bits, shift, rows):
    x = torch.randn(rows, 320, generator=torch.Generator().manual_seed(rows))
    if kernels_for(x) is None:
        pytest.skip("no kernels")
    for outputs, group in ((64, 32), (52, 64), (16, 320)):
        dtype = torch.float16 if rows % 2 else torch.bfloat16
        matrix, codes, scales, shifts = matrix_of(bits, shift, dtype, outputs, 320, group)
        bias = torch.randn(outputs, generator=torch.Generator().manual_seed(1))
        found = packed_linear(x, matrix, bias)
        weight = plain(codes, scales, shifts, matrix.grid)
        expected = quantize_rows(x).double() @ weight.T + bias.double()
        scale = float(expected.abs().max())
        assert (found.double() - expected).abs().max() < 2e-6 * scale
        reference = reference_packed_linear(x, matrix, bias)
        assert (found - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize("bits", BITS)
def test_rows_do_not_depend_on_each_other(bits):
    matrix, *_ = matrix_of(bits, ZEROS, torch.float16, 64, 128)
    x = torch.randn(13, 128, generator=torch.Generator().manual_seed(0))
    whole = packed_linear(x, matrix)
    for i in range(13):
        assert torch.equal(packed_linear(x[i : i + 1], matrix), whole[i : i + 1])
    assert torch.equal(packed_linear(x[4:9], matrix), whole[4:9])


def test_inputs_that_fill_no_whole_group_of_32():
    matrix, codes, scales, shifts = matrix_of(4, ZEROS, torch.float16, 16, 40, 40)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    expected = quantize_rows(x).double() @ plain(codes, scales, shifts, matrix.grid).T
    torch.testing.assert_close(packed_linear(x, matrix).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dequantized_weight(dtype):
    matrix, *_ = matrix_of(3, ZEROS, torch.float16, 24, 64)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.requires_grad_()
    packed_linear(x, matrix).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    (other @ matrix.dequantize().to(dtype).T).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_grids_that_the_kernels_do_not_support_are_named():
    def reason(inputs=128, **changes):
        values = {"bits": 4, "scale_dtype": torch.float16, "shift": NONE, "group_size": 32}
        return unsupported_reason(Grid(**values | changes), inputs)

    assert reason() is None
    assert reason(group_size=128) is None
    assert reason(group_size=40, inputs=40) is None
    assert "6 bits" in reason(bits=6)
    assert "float32" in reason(scale_dtype=torch.float32)
    assert "groups of 16" in reason(group_size=16)
