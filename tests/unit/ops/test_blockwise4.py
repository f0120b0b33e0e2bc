"""NF4 and FP4 weights: the kernel against the reference, products, gradients, batch invariance."""

import pytest
import torch
from torch.nn import functional as F

from easyllm.ops import blockwise4
from easyllm.ops.blockwise4 import (
    CODEBOOKS,
    blockwise4_linear,
    dequantize,
    packed_bytes,
    reference_dequantize,
)
from easyllm.ops.kernels import build
from easyllm.quant import quantize_blockwise4

pytestmark = pytest.mark.usefixtures("two_threads")  # kernels split their work

SHAPES = [(64, 64), (13, 70), (1, 1), (9, 33), (5, 63), (200, 1536), (130, 257)]
FORMATS = pytest.mark.parametrize(
    ("codebook", "nested"), [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture
def kernels():
    if build._library() is None:
        pytest.skip("no C compiler on this machine")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(shape=(48, 96), codebook="nf4", nested=True):
    return quantize_blockwise4(random(*shape), codebook, nested=nested)


def test_nf4_is_the_quantiles_of_a_normal_distribution():
    """Eight below zero, zero, seven above, from the outermost quantile 0.9677083 on."""
    outermost = 0.9677083
    sides = [torch.linspace(outermost, 0.5, n, dtype=torch.float64)[:-1] for n in (9, 8)]
    above, below = (torch.special.ndtri(side) for side in sides)
    values = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    expected = values / values.abs().max()
    found = torch.tensor(CODEBOOKS["nf4"], dtype=torch.float64)
    assert (found - expected).abs().max() < 2e-7


@FORMATS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_dequantizes_with_the_bits_of_the_reference(
    kernels, shape, dtype, codebook, nested
):
    weight = packed(shape, codebook, nested)
    found, expected = dequantize(weight, dtype), reference_dequantize(weight, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_the_reference_works_in_pieces(monkeypatch):
    weight = packed((130, 257))
    whole = reference_dequantize(weight)
    monkeypatch.setattr(blockwise4, "PIECE", 640)
    assert torch.equal(reference_dequantize(weight), whole)


@FORMATS
def test_errors_are_within_half_the_widest_gap_of_the_codebook(codebook, nested):
    weight = random(40, 64)
    values = torch.tensor(sorted(CODEBOOKS[codebook]))
    gap = (values[1:] - values[:-1]).max() / 2
    found = dequantize(quantize_blockwise4(weight, codebook, nested=nested))
    scale = weight.abs().amax(1, keepdim=True)  # a row is a block
    slack = 0.03 if nested else 1e-6  # an 8-bit scale is within a few percent
    assert ((found - weight).abs() <= scale * (gap + slack)).all()


@FORMATS
@pytest.mark.parametrize("shape", SHAPES)
def test_the_size_is_that_of_the_tensors(shape, codebook, nested):
    weight = packed(shape, codebook, nested)
    tensors = [weight.codes, weight.absmax, weight.nested_absmax, weight.nested_offset]
    held = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    assert held == packed_bytes(*shape, nested=nested)


@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 70])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_those_of_the_dequantized_weight(shape, rows, dtype):
    weight, x = packed(shape), random(rows, shape[1], seed=1).to(dtype)
    bias = random(shape[0], seed=2).to(dtype)
    found = blockwise4_linear(x, weight, bias)
    assert found.dtype == dtype
    expected = F.linear(x.double(), dequantize(weight, dtype).double(), bias.double())
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < (1e-2 if dtype == torch.bfloat16 else 2e-6)


def test_products_without_kernels_are_the_same(monkeypatch):
    weight, x = packed(), random(2, 3, 96, seed=1)
    found = blockwise4_linear(x, weight)
    monkeypatch.setattr(build, "_library", lambda: None)
    torch.testing.assert_close(blockwise4_linear(x, weight), found, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_equal_those_of_the_dequantized_weight(deterministic):
    weight, full = packed(), dequantize(packed())
    grad = random(2, 7, 48, seed=3)
    given = [(random(2, 7, 96, seed=1), random(48, seed=2)) for _ in range(2)]
    for x, bias in given:
        x.requires_grad_(True), bias.requires_grad_(True)
    blockwise4_linear(*given[0][:1], weight, given[0][1], deterministic=deterministic).backward(
        grad
    )
    F.linear(given[1][0], full, given[1][1]).backward(grad)
    for mine, theirs in zip(*given, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-5)


def test_a_second_derivative_is_that_of_the_dequantized_weight():
    weight, full = packed((6, 10)), dequantize(packed((6, 10)))
    results = []
    for product in (lambda x: blockwise4_linear(x, weight), lambda x: F.linear(x, full)):
        x = random(3, 10, seed=1).requires_grad_(True)
        (first,) = torch.autograd.grad(product(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
def test_autograd_saves_no_full_weight(deterministic):
    weight, saved = packed((64, 128)), []
    x = random(8, 128, seed=1).requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        blockwise4_linear(x, weight, deterministic=deterministic)
    assert sum(tensor.numel() for tensor in saved) == 0


@DTYPES
def test_rows_are_independent_in_deterministic_mode(dtype):
    weight, x = packed((200, 1536)), random(67, 1536, seed=1).to(dtype)
    whole = blockwise4_linear(x, weight, deterministic=True)
    for rows in (1, 2, 4, 5, 33):
        alone = blockwise4_linear(x[:rows], weight, deterministic=True)
        assert torch.equal(alone, whole[:rows])


def test_a_few_rows_are_independent_without_deterministic_mode(kernels):
    weight, x = packed((200, 1536)), random(4, 1536, seed=1)
    whole = blockwise4_linear(x, weight)
    assert all(torch.equal(blockwise4_linear(x[n], weight), whole[n]) for n in range(4))


def test_a_product_leaves_no_trace_in_the_next_one():
    """Weights are dequantized into memory that is reused."""
    small, large = packed((48, 96)), packed((200, 257))
    x, y = random(9, 96, seed=1), random(9, 257, seed=2)
    first = blockwise4_linear(x, small).clone()
    kept = blockwise4_linear(x, small)
    blockwise4_linear(y, large)
    assert torch.equal(kept, first)
    with torch.inference_mode():
        blockwise4_linear(random(9, 512, seed=3), packed((300, 512)))
    x.requires_grad_(True)
    blockwise4_linear(x, small).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_autocast_gives_its_dtype():
    weight, x = packed((64, 128)), random(2, 128, seed=1).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        y = blockwise4_linear(x, weight)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32
