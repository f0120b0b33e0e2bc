"""bf16 GEMMs against fp64: the AMX kernel and PyTorch's."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from easyllm.ops import matmul as matmul_module
from easyllm.ops.attention import attention, reference_attention
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.kernels import build
from easyllm.ops.matmul import grouped_matmul, linear, linears, matmul, sum_of_matmuls

pytestmark = pytest.mark.usefixtures("two_threads")  # kernels split their work

HALF_STEP = 2.0**-8
"""Upper bound of the relative error of a sum rounded to bf16 once, with a margin for the sum."""


@pytest.fixture(params=["kernel", "pytorch"])
def path(request, monkeypatch):
    if request.param == "pytorch":
        monkeypatch.setattr(matmul_module, "_kernels", lambda *args, **options: None)
    else:
        need_unit()
        monkeypatch.setattr(matmul_module, "SMALL", 1)
    return request.param


def need_unit():
    library = build._library()
    if library is None or not library.gemm_ready():
        pytest.skip("no matrix unit on this machine")


def bf16(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).bfloat16()


def close(found, exact):
    error = (found.double() - exact).abs()
    bound = HALF_STEP * exact.abs() + 2e-5 * exact.square().mean().sqrt()
    assert (error <= bound).all(), f"{(error / bound).max():.2f} of what rounding once allows"


SIZES = [
    (33, 40, 1000),
    (64, 64, 4096),  # several chunks of the sum; unpacked rows
    (100, 201, 333),  # no dimension is a multiple of the tile
    (2080, 48, 130),  # more rows than are packed at a time
    (50, 2100, 70),  # more columns than are packed at a time
    (40, 300, 5000),  # partial sums are written back and reloaded
]


@pytest.mark.parametrize("turned_b", [False, True])
@pytest.mark.parametrize("turned_a", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gemms_of_any_size_and_layout_match_fp64(path, sizes, turned_a, turned_b):
    rows, columns, depth = sizes
    a = bf16(depth, rows).T if turned_a else bf16(rows, depth)
    b = bf16(columns, depth, seed=1).T if turned_b else bf16(depth, columns, seed=1)
    exact = a.double() @ b.double()
    found = matmul(a, b)
    assert found.dtype == torch.bfloat16
    close(found, exact)
    bias = bf16(columns, seed=2)
    if path == "kernel":  # it rounds once, after adding the bias
        close(matmul(a, b, bias=bias), exact + bias.double())
    wide = torch.full((rows, columns), 3.0)
    matmul(a, b, out=wide, add=True)
    tolerance = 1e-5 if path == "kernel" else 0.02
    torch.testing.assert_close(
        wide.double(), exact + 3, atol=tolerance * float(exact.abs().max()), rtol=0
    )


def test_results_are_written_only_to_the_output(path):
    a, b = bf16(70, 96), bf16(96, 100)
    around = torch.full((74, 128), 7.0, dtype=torch.bfloat16)
    inside = around[2:72, 10:110]
    matmul(a, b, out=inside)
    close(inside, a.double() @ b.double())
    inside.fill_(7.0)
    assert (around == 7).all()


def test_operands_may_have_gaps_and_zero_strides(path):
    a, b = bf16(64, 200)[:, ::2], bf16(100, 1).expand(100, 64)
    close(matmul(a, b), a.double() @ b.double())


def test_rows_are_bitwise_batch_invariant(monkeypatch):
    need_unit()
    monkeypatch.setattr(matmul_module, "SMALL", 1)
    x, weight = bf16(300, 320), bf16(96, 320, seed=1)
    whole = matmul(x, weight.T)
    for rows in (slice(0, 32), slice(37, 100), slice(200, 300)):
        assert torch.equal(matmul(x[rows], weight.T), whole[rows])
    assert torch.equal(matmul(x, weight[:33].T), whole[:, :33])


def test_results_are_bitwise_independent_of_the_number_of_threads():
    need_unit()
    a, b = bf16(500, 4500), bf16(4500, 200)
    before = matmul(a, b)
    for count in (1, 3):
        torch.set_num_threads(count)
        assert torch.equal(matmul(a, b), before)


def test_nan_and_infinity_propagate(path):
    a, b = bf16(64, 128), bf16(128, 64)
    a[3, 5] = float("nan")
    found = matmul(a, b)
    assert found[3].isnan().all()
    assert not found[:3].isnan().any()
    assert not found[4:].isnan().any()


@pytest.mark.parametrize("shape", [(70,), (2, 35), (1, 64)], ids=str)
def test_gradients_of_a_linear_layer_match_fp64(path, shape):
    leaves = [bf16(*shape, 200), bf16(130, 200, seed=1), bf16(130, seed=2)]
    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    theirs = [leaf.double().requires_grad_() for leaf in leaves]
    out, exact = linear(*ours), F.linear(*theirs)
    weights = bf16(*exact.shape, seed=3)
    close(out, exact)
    out.backward(weights)
    exact.backward(weights.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad.dtype == torch.bfloat16
        close(a.grad, b.grad)


WIDTHS = [
    (64, 32, 96),
    (96, 64),
    (1120, 992),  # more inputs, and rows, than are packed at a time
    (40, 64),  # these cannot be fused
]


@pytest.mark.parametrize("rows", [1, 5, 32, 33, 128, 129])
@pytest.mark.parametrize("inputs", [1024, 1056], ids=["rows map to one set", "rows do not"])
def test_few_rows_of_large_weights_match_fp64(path, rows, inputs):
    """As in an expert: weights are read in place, and the parts of ∂X are rounded, too."""
    x = bf16(rows, inputs).requires_grad_()
    weights = [bf16(n, inputs, seed=n).requires_grad_() for n in (512, 640)]
    assert sum(w.numel() for w in weights) >= matmul_module.LARGE
    outs = linears(x, weights, [None, None])
    errors = [bf16(rows, len(w), seed=3) for w in weights]
    torch.autograd.backward(outs, errors)
    wide_x, wide = x.detach().double(), [w.detach().double() for w in weights]
    for out, weight, error, of in zip(outs, wide, errors, weights, strict=True):
        assert out.is_contiguous()
        close(out.detach(), wide_x @ weight.T)
        close(of.grad, error.double().T @ wide_x)
    parts = [error.double() @ weight for error, weight in zip(errors, wide, strict=True)]
    sizes = sum(part.abs() for part in (*parts, sum(parts)))
    bound = HALF_STEP * sizes + 1e-4 * parts[0].abs().mean()
    assert ((x.grad.double() - sum(parts)).abs() <= bound).all()


@pytest.mark.parametrize("rows", [2080, 50, 64])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_fused_matrices_equal_their_separate_gemms(path, widths, rows):
    if rows > 2000:
        widths = widths[:2]
    x, weights = bf16(rows, 160), [bf16(n, 160, seed=n) for n in widths]
    errors = [bf16(rows, n, seed=n + 1) for n in widths]
    for out, weight in zip(linears(x, weights, [None] * len(widths)), weights, strict=True):
        close(out, x.double() @ weight.double().T)
        if path == "kernel":
            assert torch.equal(out, matmul(x, weight.T))
    for out, error in zip(grouped_matmul([e.T for e in errors], x), errors, strict=True):
        close(out, error.double().T @ x.double())
        if path == "kernel":
            assert torch.equal(out, matmul(error.T, x))
    exact = sum(e.double() @ w.double() for e, w in zip(errors, weights, strict=True))
    found = sum_of_matmuls(errors, weights)
    if path == "kernel" and widths[0] % 32 == 0:
        close(found, exact)
    else:
        assert (found.double() - exact).norm() < 0.01 * exact.norm()


def test_fused_operands_may_have_any_layout(path):
    rows = 128
    errors = [bf16(rows, 64), bf16(32, rows).T, bf16(rows, 64)[:, ::2]]
    weights = [bf16(96, 64, seed=3).T, bf16(32, 96, seed=4), bf16(1, 96, seed=5).expand(32, 96)]
    exact = sum(e.double() @ w.double() for e, w in zip(errors, weights, strict=True))
    assert (sum_of_matmuls(errors, weights).double() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("trained", [(0, 1, 2, 3, 4, 5, 6), (0,), (2, 3), (0, 2, 6)], ids=str)
def test_gradients_of_layers_that_share_an_input_match_fp64(path, trained):
    """x, three weights and their biases, some of which are trained."""
    leaves = [bf16(4, 70, 96), *(bf16(n, 96, seed=n) for n in (64, 32, 128))]
    leaves += [bf16(n, seed=n) for n in (64, 32, 128)]
    ours = [leaf.clone().requires_grad_(i in trained) for i, leaf in enumerate(leaves)]
    theirs = [leaf.double().requires_grad_(i in trained) for i, leaf in enumerate(leaves)]
    found = linears(ours[0], ours[1:4], ours[4:])
    exact = [F.linear(theirs[0], w, b) for w, b in zip(theirs[1:4], theirs[4:], strict=True)]
    weights = [bf16(*y.shape, seed=9) for y in exact]
    for a, b in zip(found, exact, strict=True):
        assert (a.double() - b).norm() < 0.004 * b.norm()
    for outputs in (found, exact):
        pairs = zip(outputs, weights, strict=True)
        sum((y.double() * w.double()).sum() for y, w in pairs).backward()
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            assert (a.grad.double() - b.grad).norm() < 0.006 * b.grad.norm()


def test_frozen_weights_have_no_gradient(path):
    x, weight = bf16(64, 128).requires_grad_(), bf16(96, 128, seed=1)
    linear(x, weight).float().sum().backward()  # its gradient is one number, broadcast
    close(x.grad, torch.ones(64, 96).double() @ weight.double())
    assert weight.grad is None
    assert not linear(x.detach(), weight).requires_grad


def test_a_gradient_can_be_differentiated_again(path):
    x, weight = bf16(64, 128).requires_grad_(), bf16(96, 128, seed=1).requires_grad_()
    (grad,) = torch.autograd.grad(linear(x, weight).float().sum(), x, create_graph=True)
    grad.float().square().sum().backward()
    sums = weight.detach().double().sum(0)  # over outputs: the input's gradient, equal in all rows
    expected = (2 * 64 * sums).expand(96, 128)
    torch.testing.assert_close(
        weight.grad.double(), expected, atol=0.02 * float(expected.abs().max()), rtol=0.02
    )


def test_mismatched_operands_are_refused(path):
    x, weight = bf16(256, 256), bf16(96, 256)
    with pytest.raises(RuntimeError):
        linear(x, bf16(96, 64))
    with pytest.raises(RuntimeError):
        matmul(x, weight)
    with pytest.raises(ValueError, match="out has shape"):
        matmul(x, weight.T, out=torch.empty(256, 90, dtype=torch.bfloat16))
    one = bf16(1)
    close(linear(x, weight, one), x.double() @ weight.double().T + one.double())
    turned = torch.empty(96, 256, dtype=torch.bfloat16).T
    close(matmul(x, weight.T, out=turned), x.double() @ weight.double().T)


def test_only_tensors_needed_for_gradients_are_saved(path):
    x, frozen = bf16(256, 128).requires_grad_(), bf16(96, 128)
    middle = x * 1
    out = linear(middle, frozen)
    middle.add_(1)  # the gradient of the input does not need it
    out.float().sum().backward()
    close(x.grad, torch.ones(256, 96).double() @ frozen.double())


def test_unsupported_cases_are_computed_by_pytorch():
    need_unit()
    weight = bf16(64, 64)
    serves = matmul_module._kernels
    assert serves((weight, weight), 1024, 64, 64) is not None
    assert serves((weight, weight), 31, 4096, 4096) is None  # too few rows
    assert serves((weight.float(), weight), 1024, 64, 64) is None
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(1024, 64, requires_grad=True)
        assert serves((weight, weight), 1024, 64, 64) is None
        assert linear(x, torch.randn(64, 64)).dtype == torch.bfloat16
    assert linear(torch.randn(1024, 64), torch.randn(64, 64)).dtype == torch.float32


@pytest.mark.parametrize("lengths", [(700,), (32, 1, 0, 300, 33)], ids=str)
def test_attention_rounds_as_little_as_bf16_allows(lengths):
    """Probabilities are rounded once more before multiplying the values, which adds little."""
    need_unit()
    total, rule = sum(lengths), AttentionRule(scale=80**-0.5)
    q, k, v, grad = (bf16(total, n, 80, seed=n) for n in (4, 2, 2, 4))
    ours = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = [x.double().requires_grad_() for x in (q, k, v)]
    out = attention(*ours, rule, lengths)
    parts = zip(*(x.split(lengths) for x in theirs), strict=True)
    exact = torch.cat([reference_attention(*part, rule) for part in parts])
    out.backward(grad)
    exact.backward(grad.double())
    assert (out.double() - exact).norm() < 0.003 * exact.norm()
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad.double() - b.grad).norm() < 0.004 * b.grad.norm()


def test_nan_scores_reach_only_their_sequence():
    need_unit()
    q, k, v = (bf16(100, 2, 64, seed=n).requires_grad_() for n in range(3))
    with torch.no_grad():
        q[10, 0, 0] = float("nan")
    out = attention(q, k, v, AttentionRule(scale=0.125), (50, 50))
    assert out[10, 0].isnan().all()
    assert out.isnan().sum() == 64


def test_a_nan_key_is_not_mistaken_for_a_masked_one():
    """With several chunks of keys, every query that sees the NaN key is NaN, wherever it is."""
    need_unit()
    for place in (0, 100, 243, 255, 256, 500):
        q, k, v = (bf16(600, 1, 64, seed=n).requires_grad_() for n in range(3))
        with torch.no_grad():
            k[place] = float("nan")
        out = attention(q, k, v, AttentionRule(scale=0.125), (600,))
        assert out[place:].isnan().all(), place
        assert not out[:place].isnan().any(), place


def test_amx_can_be_disabled():
    """Kernels for CPUs without AMX give correct results on a CPU with AMX."""
    need_unit()
    left = (
        "import torch; from easyllm.ops.kernels.build import _library; assert not "
        "_library().gemm_ready()"
    )
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "attention",
        "tests/numerics/test_kernels.py",
    ]
    for command in ([sys.executable, "-c", left], tests):
        done = subprocess.run(
            command,
            env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
