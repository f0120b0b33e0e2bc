"""Row-wise operations are bitwise batch-invariant: any number, order and mix of rows."""

import pytest
import torch
from torch.nn import functional as F

from easyllm.ops.activation import gated
from easyllm.ops.attention import attention
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.deterministic import (
    fixed_order_linear,
    packed_attention,
    sums_have_fixed_order,
    tiled_linear,
)
from easyllm.ops.kernels import build
from easyllm.ops.logsumexp import logsumexp
from easyllm.ops.low_rank import LowRank, add_low_rank_updates, low_rank_update
from easyllm.ops.norm import rms_norm
from easyllm.ops.paged_attention import paged_attention, write_pages
from easyllm.ops.rotary import apply_rotary

pytestmark = pytest.mark.usefixtures("two_threads")  # kernels split their work

DTYPES = [torch.float32, torch.bfloat16]
COUNTS = [1, 2, 3, 5, 7, 9, 16, 31, 32, 33, 63, 100, 200]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def holds_for_rows(run, x):
    """Compares `run` of the first, of middle and of reordered rows with `run` of all rows."""
    whole = run(x)
    for count in COUNTS:
        assert torch.equal(run(x[:count]), whole[:count]), f"first {count}"
        start = (7 * count) % (len(x) - count) if count < len(x) else 0
        middle = slice(start, start + count)
        assert torch.equal(run(x[middle]), whole[middle]), f"{count} from {start}"
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(x[order]), whole[order])


@pytest.mark.parametrize("linear", [fixed_order_linear, tiled_linear])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(576, 576), (192, 576), (576, 1536), (83, 41)])
def test_linears_are_batch_invariant(dtype, outputs, inputs, linear):
    weight = random(outputs, inputs, dtype=dtype, seed=2)
    bias = random(outputs, dtype=dtype, seed=3)
    x = random(200, inputs, dtype=dtype)
    holds_for_rows(lambda rows: linear(rows, weight, bias), x)
    close = {"atol": 2e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.5, "rtol": 0.02}
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), **close)
    assert linear(x[None, :3], weight).shape == (1, 3, outputs)
    assert linear(x[:0], weight).shape == (0, outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fixed_order_does_not_depend_on_the_number_of_threads(dtype):
    if build._library() is None:
        pytest.skip("no C compiler on this machine")
    weight, x = random(83, 576, dtype=dtype, seed=2), random(150, 576, dtype=dtype)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(fixed_order_linear(x, weight))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_fixed_order_has_the_gradients_of_a_linear_layer():
    operands = random(2, 7, 41), random(83, 41, seed=2), random(83, seed=3)
    grads = []
    for linear in (fixed_order_linear, F.linear):
        x, weight, bias = (t.clone().requires_grad_() for t in operands)
        linear(x, weight, bias).square().sum().backward()
        grads.append((x.grad, weight.grad, bias.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_a_fixed_order_of_strided_weights_and_wrong_lengths():
    weight, x = random(41, 83, seed=2).T, random(5, 41)
    assert torch.equal(fixed_order_linear(x, weight), fixed_order_linear(x, weight.contiguous()))
    assert torch.equal(
        fixed_order_linear(x.T.contiguous().T, weight), fixed_order_linear(x, weight)
    )
    with pytest.raises(ValueError, match="rows of 5 values, expected 41"):
        fixed_order_linear(x.T, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 41, 1000, 49152])
def test_logsumexp_is_batch_invariant_and_exact(dtype, width):
    x = 10 * random(40, width, dtype=dtype)
    exact = x.double().logsumexp(-1)
    assert (logsumexp(x) - exact).abs().max() <= 2e-6 * exact.abs().max() + 1e-6
    whole = logsumexp(x)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for count in (1, 2, 7, 40):
            assert torch.equal(logsumexp(x[:count]), whole[:count])


def test_logsumexp_of_excluded_infinite_and_nan_logits():
    inf = float("inf")
    x = torch.tensor([[-inf, 0.0, -inf], [-inf, -inf, -inf], [0.0, inf, 1.0], [0.0, 1.0, inf]])
    x[3, 2] = float("nan")
    found = logsumexp(x)
    assert found[:3].tolist() == [0.0, -inf, inf]
    assert found[3].isnan()


def test_logsumexp_has_the_gradient_of_pytorch():
    values = random(7, 83)
    grads = []
    for function in (logsumexp, lambda x: x.logsumexp(-1)):
        x = values.clone().requires_grad_()
        function(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


UPDATES = [(96, 83, 16), (41, 40, 3), (576, 8, 40), (24, 192, 1), (64, 64, 8)]


def update_of(inputs, outputs, rank, dtype=torch.float32):
    down, up = random(rank, inputs, seed=2), random(outputs, rank, seed=3)
    return LowRank(down.to(dtype), up.to(dtype), 0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs", "rank"), UPDATES)
def test_low_rank_updates_are_batch_invariant(dtype, inputs, outputs, rank):
    update = update_of(inputs, outputs, rank)
    both = random(200, inputs + outputs, dtype=dtype)
    x, y = both.split([inputs, outputs], dim=1)
    holds_for_rows(
        lambda rows: low_rank_update(*rows.split([inputs, outputs], dim=1), update), both
    )
    found = low_rank_update(x, y, update)
    exact = y.double() + 0.7 * (x.double() @ update.down.double().T) @ update.up.double().T
    size = 2e-2 if dtype == torch.bfloat16 else 2e-6
    assert (found - exact).abs().max() <= size * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_updates_of_groups_are_those_of_each_row(dtype):
    """Ranks differ, a group is empty, one has no ranks, and rows are in any order."""
    if not sums_have_fixed_order(dtype):
        pytest.skip("products in this dtype do not run in the kernels here")
    updates = [update_of(96, 83, rank) for rank in (16, 3, 0, 40, 8)]
    groups = [[5, 90, 7], list(range(20, 70)), [1], [], [3, 2]]
    x, y = random(100, 96, dtype=dtype), random(100, 83, dtype=dtype, seed=1)
    starts = torch.tensor([0, *(len(rows) for rows in groups)]).cumsum(0)
    rows_of_all = torch.tensor([row for rows in groups for row in rows])
    found = y.clone()
    add_low_rank_updates(x, found, updates, starts, rows_of_all)
    expected = y.clone()
    for update, rows in zip(updates, groups, strict=True):
        if rows:
            expected[rows] = low_rank_update(x[rows], y[rows], update)
    assert torch.equal(found, expected)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        again = y.clone()
        add_low_rank_updates(x, again, updates, starts, rows_of_all)
        assert torch.equal(again, found)


def test_low_rank_updates_have_the_gradients_of_two_products():
    operands = random(2, 7, 41), random(2, 7, 83, seed=1), random(3, 41), random(83, 3, seed=4)
    grads = []
    for kernel in (True, False):
        x, y, down, up = (t.clone().requires_grad_() for t in operands)
        if kernel:
            out = low_rank_update(x, y, LowRank(down, up, 0.7))
        else:
            out = y + 0.7 * (x @ down.T) @ up.T
        out.square().sum().backward()
        grads.append((x.grad, y.grad, down.grad, up.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-4)


def test_plain_linear_is_not_batch_invariant():
    """Negative control: without tiles, results depend on the number of rows (on most machines)."""
    weight, x = random(576, 576, seed=2), random(200, 576)
    whole = F.linear(x, weight)
    same = [torch.equal(F.linear(x[:count], weight), whole[:count]) for count in COUNTS]
    if all(same):
        pytest.skip("this machine's F.linear gives the same bits for every number of rows tried")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [576, 41])
def test_rms_norm_is_batch_invariant(dtype, width):
    weight = random(width, dtype=dtype, seed=2)
    holds_for_rows(lambda rows: rms_norm(rows, weight, 1e-5), random(200, width))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("activation", "width"),
    # PyTorch's GELU computes a remainder of fewer than 64 elements differently
    [("silu", 1536), ("silu", 41), ("gelu", 1536), ("gelu_tanh", 1536), ("gelu_tanh", 64)],
)
def test_gates_are_batch_invariant(dtype, activation, width):
    if build._library() is None and width % 16:
        pytest.skip("no C compiler on this machine")
    both = random(200, 2, width, dtype=dtype)
    holds_for_rows(
        lambda rows: gated(rows[:, 0].contiguous(), rows[:, 1].contiguous(), activation), both
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_embedding_is_batch_invariant(dtype):
    angles = random(200, 32, seed=2)
    x = torch.cat([random(200, 9 * 64), angles.cos(), angles.sin()], dim=1)

    def run(rows):
        heads = rows[:, : 9 * 64].to(dtype).view(-1, 9, 64)
        cos, sin = (part.contiguous() for part in rows[:, 9 * 64 :].chunk(2, dim=1))
        return apply_rotary(heads, cos, sin)

    holds_for_rows(run, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_gate_is_bitwise_identical_with_a_gradient(dtype):
    gate, up = random(50, 300, dtype=dtype), random(50, 300, dtype=dtype, seed=1)
    plain = gated(gate, up, "silu")
    assert torch.equal(gated(gate.clone().requires_grad_(), up, "silu").detach(), plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 37])
def test_packed_attention_is_bitwise_identical_to_paged_decoding(dtype, window):
    if build._library() is None:
        pytest.skip("no C compiler on this machine")
    rule, lengths = AttentionRule(scale=0.125, window=window), (150, 1, 64, 70)
    q, k, v = (random(285, heads, 64, dtype=dtype, seed=heads + 1) for heads in (6, 2, 2))
    out = packed_attention(q, k, v, rule, lengths)
    torch.testing.assert_close(
        out,
        attention(q, k, v, rule, lengths),
        atol=2e-2 if dtype == torch.bfloat16 else 1e-5,
        rtol=1e-2,
    )
    parts = zip(*(x.split(lengths) for x in (q, k, v, out)), strict=True)
    for page_size, (q_s, k_s, v_s, out_s) in zip((8, 16, 24, 128), parts, strict=True):
        count = -(-len(q_s) // page_size)
        pages = [torch.zeros(count, 2, page_size, 64, dtype=dtype) for _ in range(2)]
        token = torch.arange(len(q_s))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        for store, x in zip(pages, (k_s, v_s), strict=True):
            write_pages(store, x, order[token // page_size], token % page_size)
        table = order.int()[None]
        for row in {0, len(q_s) // 2, len(q_s) - 1}:
            one = paged_attention(q_s[row : row + 1], *pages, table, (1,), (row + 1,), rule)
            assert torch.equal(one[0], out_s[row])
