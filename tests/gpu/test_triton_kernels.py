"""The Triton kernels compared with the equations in fp64, and called through the operations."""

import itertools

import pytest
import torch

from easyllm.ops import activation, cross_entropy, norm, rotary
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.paged_attention import reference_paged_attention

FP32, BF16 = torch.float32, torch.bfloat16
ROUNDING = {FP32: 2e-6, BF16: 8e-3}


@pytest.fixture(scope="module")
def device() -> torch.device:
    """The GPU if there is one, otherwise the CPU, where Triton's interpreter runs the kernels."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def through_triton(device, monkeypatch):
    """Makes the operations use the Triton kernels, on a CPU as well."""
    for module in (norm, activation, rotary, cross_entropy):
        monkeypatch.setattr(module, "triton_unsupported_reason", lambda *tensors: None)


def distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    """‖x - exact‖ / ‖exact‖"""
    return float((x.double() - exact).norm() / exact.norm())


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize(
    ("shape", "x_dtype", "w_dtype"),
    [
        ((7, 576), FP32, BF16),
        ((3, 5, 64), BF16, BF16),
        ((300, 40), FP32, FP32),
        ((1, 5000), FP32, BF16),
    ],
)
def test_rms_norm_matches_fp64(through_triton, device, shape, x_dtype, w_dtype):
    x = random(*shape, dtype=x_dtype, device=device).requires_grad_()
    w = random(shape[-1], dtype=w_dtype, device=device, seed=1).requires_grad_()
    y = norm.rms_norm(x, w, 1e-5)
    grad = random(*shape, dtype=w_dtype, device=device, seed=2)
    y.backward(grad)
    wide_x, wide_w = (t.detach().double().requires_grad_() for t in (x, w))
    exact = norm.reference_rms_norm(wide_x, wide_w, 1e-5)
    exact.backward(grad.double())
    assert y.dtype == w_dtype
    assert x.grad.dtype == x_dtype
    assert distance(y.detach(), exact.detach()) < ROUNDING[w_dtype]
    assert distance(x.grad, wide_x.grad) < ROUNDING[x_dtype]
    assert distance(w.grad, wide_w.grad) < ROUNDING[w_dtype]
    with torch.no_grad():
        assert torch.equal(norm.rms_norm(x, w, 1e-5), y)


@pytest.mark.parametrize("shape", [(7, 576), (300, 40), (1, 5000)])
@pytest.mark.parametrize("added_dtype", [FP32, BF16, None])
def test_sum_and_rms_norm_match_fp64(through_triton, device, shape, added_dtype):
    x = random(*shape, dtype=FP32, device=device).requires_grad_()
    w = random(shape[-1], dtype=BF16, device=device, seed=1).requires_grad_()
    leaves, added = [x, w], None
    if added_dtype is not None:
        added = random(*shape, dtype=added_dtype, device=device, seed=3).requires_grad_()
        leaves.append(added)
    total, y = norm.add_rms_norm(x, added, w, 1e-5)
    assert torch.equal(total, x if added is None else x + added)
    with torch.no_grad():
        assert torch.equal(y, norm.rms_norm(total, w, 1e-5))
    grad = random(*shape, dtype=BF16, device=device, seed=2)
    torch.autograd.backward([total, y], [grad.float().cos(), grad])
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact_sum = wide[0] + (wide[2] if added is not None else 0)
    exact = norm.reference_rms_norm(exact_sum, wide[1], 1e-5)
    torch.autograd.backward([exact_sum, exact], [grad.double().cos(), grad.double()])
    for ours, theirs in zip(leaves, wide, strict=True):
        assert ours.grad.dtype == ours.dtype
        assert distance(ours.grad, theirs.grad) < ROUNDING[ours.dtype]


def test_the_weight_gradient_is_skipped_if_not_required(through_triton, device):
    x = random(4, 64, dtype=FP32, device=device).requires_grad_()
    w = random(64, dtype=FP32, device=device)
    norm.rms_norm(x, w, 1e-5).sum().backward()
    assert w.grad is None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_silu_gate_matches_fp64(through_triton, device, dtype):
    gate, up = (random(5, 700, dtype=dtype, device=device, seed=i).requires_grad_() for i in (0, 1))
    y = activation.gated(gate, up, "silu")
    grad = random(5, 700, dtype=dtype, device=device, seed=2)
    y.backward(grad)
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    exact = torch.nn.functional.silu(wide[0]) * wide[1]
    exact.backward(grad.double())
    assert distance(y.detach(), exact.detach()) < ROUNDING[dtype]
    assert distance(gate.grad, wide[0].grad) < ROUNDING[dtype]
    assert distance(up.grad, wide[1].grad) < ROUNDING[dtype]
    with torch.no_grad():
        assert torch.equal(activation.gated(gate, up, "silu"), y)


@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (9, 64), (3, 80)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rotary_embedding_matches_fp64(through_triton, device, heads, dim, dtype):
    wide = random(33, 2 * heads, dim, dtype=dtype, device=device)
    x = wide[:, heads:].detach().requires_grad_()  # a non-contiguous slice
    angles = random(33, dim // 2, dtype=FP32, device=device, seed=1) * 100
    cos, sin = angles.cos(), angles.sin()
    y = rotary.apply_rotary(x, cos, sin)
    grad = random(33, heads, dim, dtype=dtype, device=device, seed=2)
    y.backward(grad)
    exact = rotary.reference_rotary(x.detach().double(), cos.double(), sin.double())
    back = rotary.reference_rotary(grad.double(), cos.double(), -sin.double())
    assert y.is_contiguous()
    assert distance(y.detach(), exact) < ROUNDING[dtype]
    assert distance(x.grad, back) < ROUNDING[dtype]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"z_loss": 0.1},
        {"label_smoothing": 0.2},
        {"softcap": 3.0},
        {"softcap": 2.0, "z_loss": 0.01, "label_smoothing": 0.1},
    ],
)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_cross_entropy_matches_fp64(through_triton, device, shape, dtype, monkeypatch):
    hidden = random(11, 48, dtype=dtype, device=device).requires_grad_()
    weight = random(5000, 48, dtype=dtype, device=device, seed=1).requires_grad_()
    labels = torch.arange(11, device=device) * 450
    labels[3] = -100
    loss = cross_entropy.linear_cross_entropy(hidden, weight, labels, chunk_rows=4, **shape)
    loss.sum.backward()
    monkeypatch.setattr(cross_entropy, "triton_unsupported_reason", lambda *tensors: "off")
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = cross_entropy.linear_cross_entropy(*wide, labels, **shape)
    exact.sum.backward()
    assert loss.num_tokens == exact.num_tokens == 10
    bound = {FP32: 1e-5, BF16: 2e-2}[dtype]
    assert loss.sum.item() == pytest.approx(exact.sum.item(), rel=bound)
    assert distance(hidden.grad, wide[0].grad) < bound
    assert distance(weight.grad, wide[1].grad) < bound


def test_losses_of_extreme_logits_stay_finite(through_triton, device):
    logits = torch.full((3, 4100), -30000.0, device=device)
    logits[0, 4099] = 30000.0
    logits[1] = 0.0
    labels = torch.tensor([4099, 7, 0], device=device)
    loss, error = cross_entropy.softmax_error(logits, labels, with_grad=True)
    assert loss.tolist() == pytest.approx([0.0, 8.3187, 8.3187], abs=1e-3)
    assert torch.isfinite(error).all()
    assert float(error.sum(1).abs().max()) < 1e-4


def paged(device, *, lengths, heads, kv_heads, dim, size, dtype, seed=0):
    """Returns queries [S, H, d], shuffled pages, and a block table."""
    widths = [-(-n // size) for n in lengths]
    generator = torch.Generator().manual_seed(seed)
    order = iter(torch.randperm(sum(widths) + 3, generator=generator).tolist())
    table = torch.zeros(len(lengths), max(widths), dtype=torch.int32)
    for row, width in enumerate(widths):
        table[row, :width] = torch.tensor(list(itertools.islice(order, width)))
    shape = (sum(widths) + 3, kv_heads, size, dim)
    keys, values = (random(*shape, dtype=dtype, device=device, seed=seed + i) for i in (1, 2))
    q = random(len(lengths), heads, dim, dtype=dtype, device=device, seed=seed)
    return q, keys, values, table.to(device)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "size"), [(9, 3, 64, 16), (4, 4, 80, 8), (32, 1, 16, 16)]
)
@pytest.mark.parametrize("window", [None, 20, 300])
def test_decode_attention_matches_fp64_and_is_batch_invariant(
    device, heads, kv_heads, dim, size, window
):
    from easyllm.ops.gpu.paged_attention import decode_attention

    lengths = [1, 16, 17, 255, 256, 257, 600]
    q, keys, values, table = paged(
        device, lengths=lengths, heads=heads, kv_heads=kv_heads, dim=dim, size=size, dtype=FP32
    )
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    scale = dim**-0.5
    out = decode_attention(q, keys, values, table, counts, scale=scale, window=window)
    rule = AttentionRule(scale=scale, window=window)
    ones = (1,) * len(lengths)
    wide = (x.double() for x in (q, keys, values))
    exact = reference_paged_attention(*wide, table, ones, tuple(lengths), rule)
    assert distance(out, exact) < 1e-5
    for row in (0, 5):  # a single row, with a table of another width: bitwise identical
        alone = decode_attention(
            q[row : row + 1],
            keys,
            values,
            table[row : row + 1, : -(-lengths[row] // size)].contiguous(),
            counts[row : row + 1],
            scale=scale,
            window=window,
        )
        assert torch.equal(alone[0], out[row])


def test_decode_attention_in_bf16_reads_nothing_past_the_sequence_length(device):
    from easyllm.ops.gpu.paged_attention import decode_attention

    lengths = [5, 300]
    q, keys, values, table = paged(
        device, lengths=lengths, heads=6, kv_heads=2, dim=32, size=16, dtype=BF16
    )
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    rule = AttentionRule(scale=0.2)
    wide = (x.double() for x in (q, keys, values))
    exact = reference_paged_attention(*wide, table, (1, 1), tuple(lengths), rule)
    for pages in (keys, values):
        pages[table[0, 0].long(), :, 5:] = torch.nan
        pages[table[1, -1].long(), :, 300 % 16 :] = torch.nan
    out = decode_attention(q, keys, values, table, counts, scale=0.2)
    assert distance(out, exact) < 1e-2
