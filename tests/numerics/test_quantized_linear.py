"""int8 and int4 linears: bounds of the codes, kernel accuracy against fp64, batch invariance."""

import pytest
import torch
from torch.nn import functional as F

from easyllm.ops.kernels import build
from easyllm.ops.packed_linear import packed_linear, reference_packed_linear
from easyllm.ops.quantized_linear import dequantize_rows, pack_int4, quantize_rows
from easyllm.quant.weight_only import SCHEMES, quantize_matrix

# kernels split their work, and must write all of the memory that they return
pytestmark = pytest.mark.usefixtures("two_threads", "memory_of_nan")

SHAPES = [(8, 32), (576, 576), (13, 70), (1, 1), (200, 1536), (9, 33)]


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(build, "_library", lambda: None)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(a, b):
    assert not a.isnan().any()
    return ((a.double() - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-5, 1.0, 300.0])
def test_weights_are_within_half_a_quantization_step(shape, size):
    weight = random(*shape) * size
    error = (quantize_matrix(weight, SCHEMES["int8"]).dequantize() - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 127 * 0.5001).all()

    error = (quantize_matrix(weight, SCHEMES["int4"]).dequantize() - weight).abs()
    for first in range(0, shape[1], 32):
        group, off = weight[:, first : first + 32], error[:, first : first + 32]
        step = (group.amax(1) - group.amin(1)) / 15
        middle = group.amin(1) + 8 * step
        # fp16 has 11 bits of precision, and steps of 2^-24 near zero
        bound = step / 2 + (8 * step + middle.abs()) * 2**-11 + 9 * 2**-24
        assert (off <= 1.001 * bound[:, None]).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_constant_rows_and_zeros_are_preserved(scheme):
    weight = torch.zeros(16, 64)
    weight[3], weight[4, :32] = 0.5, -2.0
    torch.testing.assert_close(
        quantize_matrix(weight, SCHEMES[scheme]).dequantize(), weight, atol=5e-7, rtol=1e-5
    )


def test_a_grid_of_16_values_is_recovered_exactly():
    """A weight on a Q4_1 grid (fp16 scale and offset) is reconstructed exactly."""
    generator = torch.Generator().manual_seed(1)
    step = (torch.rand(24, 6, 1, generator=generator) * 0.02 + 0.01).half().float()
    least = (-torch.rand(24, 6, 1, generator=generator) * 0.3).half().float()
    codes = torch.randint(0, 16, (24, 6, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    weight = (codes * step + least).flatten(1)
    found = quantize_matrix(weight, SCHEMES["int4"]).dequantize()
    assert ((found - weight).abs() <= 2**-10 * weight.abs().amax()).all()


def test_packing_preserves_every_code():
    codes = torch.randint(0, 16, (21, 75)).to(torch.uint8)
    steps, offsets = torch.ones(21, 3).half(), torch.zeros(21, 3).half()
    matrix = pack_int4(codes, steps, offsets)
    assert matrix.data.shape == (3, 3, 160)
    assert torch.equal(matrix.dequantize(), codes.float() - 8)
    assert torch.equal(matrix.dequantize(8, 19), codes[8:19].float() - 8)


def test_embedding_rows_are_dequantized():
    matrix = quantize_matrix(random(50, 40), SCHEMES["int8"])
    ids = torch.tensor([0, 49, 7, 7, 16])
    assert torch.equal(dequantize_rows(matrix, ids), matrix.dequantize()[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 131])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_kernel_matches_fp64_for_its_codes(kernels, scheme, shape, rows, dtype):
    """Σ s u q q' + c Σ x, in fp64."""
    matrix = quantize_matrix(random(*shape), SCHEMES[scheme])
    x = random(rows, shape[1], seed=1).to(dtype)
    x[0, 0] *= 50
    weight = matrix.dequantize().double()
    middle = matrix.__class__(_middle_codes(matrix), None, *shape).dequantize().double() * (
        matrix.bits == 4
    )
    codes = quantize_rows(x.float()).double()
    exact = codes @ (weight - middle).T + x.double() @ middle.T
    bias = random(shape[0], seed=2)
    for b in (None, bias):
        out = packed_linear(x, matrix, b)
        assert out.dtype == dtype
        assert out.shape == (rows, shape[0])
        wanted = exact if b is None else exact + b.double()
        assert relative_error(out, wanted) <= (4e-6 if dtype == torch.float32 else 4e-3)


def _middle_codes(matrix):
    """Returns the same matrix with every code at the centre, 8."""
    data = (
        matrix.data.clone()
        if matrix.bits == 4
        else torch.zeros(*matrix.data.shape[:2], 160, dtype=torch.uint8)
    )
    data[..., :128] = 0x88
    return data


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_kernel_stays_close_to_the_dequantized_weights(kernels, scheme):
    """Rounding rows to int8 adds a relative root mean square error below one percent."""
    matrix = quantize_matrix(random(300, 576), SCHEMES[scheme])
    x = random(20, 576, seed=1)
    exact = x.double() @ matrix.dequantize().double().T
    error = packed_linear(x, matrix).double() - exact
    assert error.square().mean().sqrt() <= 0.01 * exact.square().mean().sqrt()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_pytorch_fallback_equals_the_dequantized_gemm(no_kernels, shape, scheme):
    matrix = quantize_matrix(random(*shape), SCHEMES[scheme])
    x, bias = random(3, 5, shape[1], seed=1), random(shape[0], seed=2)
    exact = F.linear(x.double(), matrix.dequantize().double(), bias.double())
    assert relative_error(packed_linear(x, matrix, bias), exact) <= 2e-6


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(100, 96), (8, 32), (27, 33), (48, 576), (16, 640)])
def test_rows_are_bitwise_batch_invariant(kernels, scheme, dtype, shape):
    """Few rows are processed one by one, many with AMX if the CPU has it, with the same result."""
    matrix = quantize_matrix(random(*shape), SCHEMES[scheme])
    x = random(150, shape[1], seed=1).to(dtype)
    bias = random(shape[0], seed=2)
    alone = torch.cat([packed_linear(x[m : m + 1], matrix, bias) for m in range(len(x))])
    for first, last in [(1, 3), (0, 5), (5, 11), (0, 16), (2, 19), (30, 62), (3, 132), (0, 150)]:
        assert torch.equal(packed_linear(x[first:last], matrix, bias), alone[first:last])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_and_huge_rows_stay_finite(kernels, scheme):
    matrix = quantize_matrix(random(16, 64), SCHEMES[scheme])
    x = torch.zeros(2, 64)
    x[1] = 1e30
    out = packed_linear(x, matrix)
    assert not out[0].any()
    assert out[1].isfinite().all()
    assert packed_linear(x[:0], matrix).shape == (0, 16)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_reach_the_input_rows(scheme):
    """Required by an adapter below a quantized weight."""
    matrix = quantize_matrix(random(20, 40), SCHEMES[scheme])
    x = random(6, 40, seed=1).requires_grad_()
    grad = random(6, 20, seed=2)
    bias = random(20, seed=3)
    (ours,) = torch.autograd.grad(packed_linear(x, matrix, bias), x, grad)
    torch.testing.assert_close(ours, grad @ matrix.dequantize(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        packed_linear(x, matrix, bias), reference_packed_linear(x, matrix, bias)
    )
