"""Paged attention against attention over the same keys in order, for every rule.

Memory that must not be read contains NaN.
"""

import pytest
import torch

from easyllm.nn.position import AlibiPosition, ReRopePosition, ShawPosition, T5Position
from easyllm.nn.position_config import ReRope, Shaw, T5Bias
from easyllm.ops.attention import AttentionRule, attend_segment
from easyllm.ops.paged_attention import paged_attention

H, K, D = 6, 2, 8
SCALE = {"scale": 0.3}
SEQUENCES = [(1, 1), (5, 5), (1, 33), (7, 20), (1, 16), (17, 17), (3, 64)]
"""New tokens and all tokens of each sequence."""


def drawn(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return module.double().requires_grad_(False)


RULES = {
    "plain": AttentionRule(**SCALE),
    "window": AttentionRule(**SCALE, window=5),
    "wide window": AttentionRule(**SCALE, window=40),
    "window of one": AttentionRule(**SCALE, window=1),
    "window and sinks": AttentionRule(**SCALE, window=5, num_sinks=2),
    "soft cap": AttentionRule(**SCALE, softcap=1.5),
    "soft cap and window": AttentionRule(**SCALE, softcap=1.5, window=9),
    "alibi": AttentionRule(**SCALE, terms=AlibiPosition(H).terms),
    "alibi and window": AttentionRule(**SCALE, window=7, terms=AlibiPosition(H).terms),
    "t5": AttentionRule(
        **SCALE,
        terms=drawn(T5Position(T5Bias(num_buckets=8, max_distance=16), H, causal=True)).terms,
    ),
    "shaw": AttentionRule(**SCALE, terms=drawn(ShawPosition(Shaw(max_distance=3), D)).terms),
    "rerope": AttentionRule(**SCALE, terms=ReRopePosition(ReRope(window=6), D).terms),
}


def case(page_size, dtype=torch.float64, seed=0):
    """Returns queries, NaN-filled pages with the keys, the table, and ordered keys and values."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-total // page_size) for _, total in SEQUENCES]
    order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    shape = (len(order), K, page_size, D)
    pages = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    table = torch.full((len(SEQUENCES), max(counts) + 2), order[-1], dtype=torch.int32)
    parts = []
    for row, ((new, total), count) in enumerate(zip(SEQUENCES, counts, strict=True)):
        own, order = order[:count], order[count:]
        table[row, :count] = torch.tensor(own, dtype=torch.int32)
        q = torch.randn(new, H, D, generator=generator, dtype=dtype)
        k, v = (torch.randn(total, K, D, generator=generator, dtype=dtype) for _ in range(2))
        for stored, x in zip(pages, (k, v), strict=True):
            for i in range(total):
                stored[own[i // page_size], :, i % page_size] = x[i]
        parts.append((q, k, v))
    return torch.cat([q for q, _, _ in parts]), pages, table, parts


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("name", RULES)
def test_paged_equals_dense(name, page_size):
    rule = RULES[name]
    q, (keys, values), table, parts = case(page_size)
    lengths, totals = zip(*SEQUENCES, strict=True)
    out = paged_attention(q, keys, values, table, lengths, totals, rule)
    expected = torch.cat([attend_segment(*part, rule) for part in parts])
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("page_size", [1, 4])
def test_pages_entirely_before_the_window_are_not_read(page_size):
    rule = RULES["window"]
    q, (keys, values), table, parts = case(page_size)
    for row, (new, total) in enumerate(SEQUENCES):
        gone = max(0, total - new - rule.window + 1) // page_size
        for stored in (keys, values):
            stored[table[row, :gone].long()] = torch.nan
    lengths, totals = zip(*SEQUENCES, strict=True)
    out = paged_attention(q, keys, values, table, lengths, totals, rule)
    expected = torch.cat([attend_segment(*part, rule) for part in parts])
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


def test_prefixes_are_bidirectional_only_in_the_first_pass_of_a_sequence():
    rule = RULES["plain"]
    q, (keys, values), table, parts = case(4)
    lengths, totals = zip(*SEQUENCES, strict=True)
    prefixes = (1, 3, 30, 9, 2, 17, 60)
    out = paged_attention(q, keys, values, table, lengths, totals, rule, prefixes)
    expected = torch.cat(
        [attend_segment(*part, rule, prefix=p) for part, p in zip(parts, prefixes, strict=True)]
    )
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    with pytest.raises(AssertionError, match="a prefix must be complete"):
        paged_attention(q, keys, values, table, lengths, totals, rule, (1, 3, 33, 9, 2, 17, 64))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_pages_of_another_dtype_are_converted(stored):
    rule = RULES["plain"]
    q, (keys, values), table, parts = case(16, torch.float32)
    lengths, totals = zip(*SEQUENCES, strict=True)
    out = paged_attention(q, keys.to(stored), values.to(stored), table, lengths, totals, rule)
    assert out.dtype == q.dtype
    rounded = [(a, b.to(stored).float(), c.to(stored).float()) for a, b, c in parts]
    expected = torch.cat([attend_segment(*part, rule) for part in rounded])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
