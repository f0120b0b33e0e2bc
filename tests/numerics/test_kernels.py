"""Every op against its plain fp64 reference: outputs, gradients, kernels, fallbacks, odd sizes."""

import pytest
import torch
from torch.nn import functional as F

from easyllm.ops import activation, attention, cross_entropy, embedding, norm, rotary
from easyllm.ops.attention import reference_attention
from easyllm.ops.attention_rule import AttentionRule

# kernels split their work, and must write all of the memory that they return
pytestmark = pytest.mark.usefixtures("two_threads", "memory_of_nan")

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def leaves(*shapes, dtype):
    generator = torch.Generator().manual_seed(sum(map(len, shapes)))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def compare(out, exact, inputs, dtype):
    """Compares outputs, then gradients of a random weighting, relative to the largest value."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    close(out, exact, dtype)
    ours = torch.autograd.grad(out, inputs, weights, retain_graph=True)
    theirs = torch.autograd.grad(exact, inputs, weights.to(exact.dtype))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        close(a, b, dtype)


def close(a, b, dtype):
    scale = b.abs().max().double().clamp(min=1e-6)
    error = (a.double() - b.double()).abs().max() / scale
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 17, 576])
def test_rms_norm_matches_fp64(kernels_or_plain, dtype, width):
    x, _ = leaves((13, width), (1,), dtype=torch.float32)
    (w,) = leaves((width,), dtype=dtype)
    exact = norm.reference_rms_norm(x.double(), w.double(), 1e-5)
    compare(norm.rms_norm(x, w, 1e-5), exact, (x, w), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 17, 576])
def test_sum_and_rms_norm_match_fp64(kernels_or_plain, dtype, width):
    """Both results are used, as in a residual block."""
    x, added = (
        leaves((13, width), (1,), dtype=torch.float32)[0],
        leaves((13, width), dtype=dtype)[0],
    )
    (w,) = leaves((width,), dtype=dtype)
    exact_sum = x.double() + added.double()
    exact = norm.reference_rms_norm(exact_sum, w.double(), 1e-5)
    total, out = norm.add_rms_norm(x, added, w, 1e-5)
    assert torch.equal(total, x + added)
    assert torch.equal(out, norm.rms_norm(total.detach(), w, 1e-5))
    compare(torch.cat([total, out.float()]), torch.cat([exact_sum, exact]), (x, added, w), dtype)


@pytest.mark.parametrize("adds", [True, False])
def test_fused_sum_and_norm_equal_two_separate_steps(kernels_or_plain, adds):
    """Values are bitwise identical, gradients up to the rounding of one sum."""

    def steps(x, added, w):
        total = x + added if adds else x
        return total, norm.rms_norm(total, w, 1e-5)

    found = []
    for forward in (
        steps,
        lambda x, added, w: norm.add_rms_norm(x, added if adds else None, w, 1e-5),
    ):
        (x,), (added, w) = (
            leaves((13, 96), dtype=torch.float32),
            leaves((13, 96), (96,), dtype=torch.bfloat16),
        )
        total, out = forward(x, added, w)
        (total.sin().sum() + (out * 2).sum()).backward()
        found.append((total, out, x.grad, w.grad) + ((added.grad,) if adds else ()))
    (total, out, *ours), (exact_total, exact, *theirs) = found
    assert torch.equal(total, exact_total)
    assert torch.equal(out, exact)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(a.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 64, 1536])
def test_silu_gate_matches_fp64(kernels_or_plain, dtype, width):
    gate, up = leaves((11, width), (11, width), dtype=dtype)
    exact = F.silu(gate.double()) * up.double()
    compare(activation.gated(gate, up, "silu"), exact, (gate, up), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_gate_saturates_without_nan(kernels_or_plain, dtype):
    gate = torch.tensor([[-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4]], dtype=dtype)
    gate.requires_grad_()
    up = torch.ones_like(gate.detach()).fill_(1.0).requires_grad_()
    compare(
        activation.gated(gate, up, "silu"), F.silu(gate.double()) * up.double(), (gate, up), dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 5])
def test_rotary_embedding_matches_fp64(kernels_or_plain, dtype, heads):
    (x,) = leaves((9, heads, 6), dtype=dtype)
    angles = torch.randn(9, 3)
    cos, sin = angles.cos(), angles.sin()
    exact = rotary.reference_rotary(x.double(), cos.double(), sin.double())
    compare(rotary.apply_rotary(x, cos, sin), exact, (x,), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_linear_cross_entropy_matches_fp64(kernels_or_plain, dtype, chunk_rows):
    hidden, weight = leaves((40, 24), (103, 24), dtype=dtype)
    labels = torch.randint(0, 103, (40,))
    labels[::3] = -100
    out = cross_entropy.linear_cross_entropy(hidden, weight, labels, chunk_rows=chunk_rows)
    assert out.num_tokens == (labels != -100).sum()
    exact = F.cross_entropy(
        hidden.double() @ weight.double().T, labels, ignore_index=-100, reduction="sum"
    )
    compare(out.sum, exact, (hidden, weight), dtype)


@pytest.mark.parametrize("labelled", [1, 31, 33, 64])
def test_padding_rows_of_the_loss_have_no_effect(kernels_or_plain, labelled):
    """In bf16 on a CPU, rows are padded to a multiple of 32; sums cover only the labelled rows."""
    hidden, weight = leaves((70, 24), (103, 24), dtype=torch.bfloat16)
    labels = torch.full((70,), -100)
    labels[70 - labelled :] = torch.randint(0, 103, (labelled,))
    out = cross_entropy.linear_cross_entropy(hidden, weight, labels, chunk_rows=48, z_loss=0.01)
    assert out.num_tokens == labelled
    logits = hidden.double() @ weight.double().T
    exact = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    exact = exact + 0.01 * logits[70 - labelled :].logsumexp(-1).square().sum()
    compare(out.sum, exact, (hidden, weight), torch.bfloat16)


def test_linear_cross_entropy_without_labels_is_zero(kernels_or_plain):
    hidden, weight = leaves((4, 8), (16, 8), dtype=torch.float32)
    out = cross_entropy.linear_cross_entropy(hidden, weight, torch.full((4,), -100))
    out.sum.backward()
    assert out.num_tokens == 0
    assert out.sum == 0
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(50, 8), (9000, 300)], ids=["small", "in large pages"])
def test_the_gradient_of_an_embedding_is_bitwise_identical_to_pytorchs(dtype, shape):
    (weight,) = leaves(shape, dtype=dtype)
    token_ids = torch.randint(0, 40, (3, 70), generator=torch.Generator().manual_seed(1))
    grad = torch.randn(3, 70, shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    ours, theirs = embedding.embedding(token_ids, weight), F.embedding(token_ids, weight)
    assert torch.equal(ours, theirs)
    (a,), (b,) = (torch.autograd.grad(out, weight, grad) for out in (ours, theirs))
    assert torch.equal(a, b)


SHAPES = {
    "gqa": (9, 3, 64, (1, 17, 200, 333), AttentionRule(scale=0.125)),
    "mha, window": (4, 4, 16, (50, 129), AttentionRule(scale=0.3, window=20)),
    "mqa, bidirectional": (4, 1, 32, (77, 3), AttentionRule(scale=0.2, causal=False)),
    "short window": (4, 2, 64, (500, 3), AttentionRule(scale=0.1, window=40)),
    "window over blocks": (2, 1, 48, (300,), AttentionRule(scale=0.1, window=130)),
    "odd head_dim": (2, 2, 10, (31, 8), AttentionRule(scale=0.3)),
    "two-sided window": (2, 2, 16, (40,), AttentionRule(scale=0.3, causal=False, window=7)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_attention_matches_fp64(kernels_or_plain, dtype, shape):
    heads, kv_heads, dim, lengths, rule = shape
    total = sum(lengths)
    q, k, v = leaves(
        (total, heads, dim), (total, kv_heads, dim), (total, kv_heads, dim), dtype=dtype
    )
    parts = zip(*(x.double().split(lengths) for x in (q, k, v)), strict=True)
    exact = torch.cat([reference_attention(*part, rule) for part in parts])
    compare(attention.attention(q, k, v, rule, lengths), exact, (q, k, v), dtype)


def test_attention_with_huge_scores_stays_finite(kernels_or_plain):
    q, k, v = leaves((70, 2, 16), (70, 2, 16), (70, 2, 16), dtype=torch.float32)
    rule = AttentionRule(scale=300.0)
    out = attention.attention(q, k, v, rule, (70,))
    exact = reference_attention(q.double(), k.double(), v.double(), rule)
    close(
        out, exact, torch.bfloat16
    )  # softmax of scores in the thousands amplifies fp32's last digit


def test_decode_rows_see_all_keys_before_them():
    """`attend_segment` with fewer queries than keys returns the last rows of the full result."""
    q, k, v = leaves((30, 4, 16), (30, 2, 16), (30, 2, 16), dtype=torch.float32)
    for rule in (AttentionRule(scale=0.25), AttentionRule(scale=0.25, window=5)):
        whole = reference_attention(q, k, v, rule)
        for count in (1, 2, 7):
            out = attention.attend_segment(q[-count:], k, v, rule)
            torch.testing.assert_close(out, whole[-count:], atol=1e-5, rtol=1e-5)
