"""Every attention mask against an explicit pairwise definition, on every path of attention."""

import math

import pytest
import torch
from torch.nn import functional as F

from easyllm.nn.position import AlibiPosition
from easyllm.ops.attention import attend_segment, attention, explicit_attention, visible
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.linear_attention import FEATURE_MAPS, Features
from easyllm.ops.linear_attention import weights as linear_weights

HEADS, DIM, SCALE = 4, 16, 0.4
SLOPES = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
ALIBI = AlibiPosition(HEADS).terms
DIRECTIONS = ("forward", "backward", "both", "backward")

PATHS = {
    "plain": {},
    "alibi": {"terms": ALIBI},
    "soft cap": {"softcap": 0.8},
    "alibi, soft cap": {"terms": ALIBI, "softcap": 0.8},
}
MASKS = {
    "causal": {},
    "window": {"window": 4},
    "window of one": {"window": 1},
    "window wider than the sequence": {"window": 50},
    "window and sinks": {"window": 3, "num_sinks": 2},
    "bidirectional": {"causal": False},
    "bidirectional window": {"causal": False, "window": 4},
    "by head": {"causal": False, "directions": DIRECTIONS},
    "by head, window": {"causal": False, "window": 4, "directions": DIRECTIONS},
}


def qkv(length, kv_heads=2, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(length, heads, DIM) for heads in (HEADS, kv_heads, kv_heads)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def sees(i, j, *, causal=True, window=None, num_sinks=0, prefix=0, direction="both"):
    """Returns whether the query at position i sees the key at position j."""
    inside = i < prefix and j < prefix
    hidden = "forward" if i < j else "backward"  # the direction of heads that do not look there
    if (inside or not causal) and i != j and direction == hidden:
        return False
    if inside:
        return True
    if causal and j > i:
        return False
    return window is None or abs(i - j) < window or j < num_sinks


def by_hand(q, k, v, *, terms=None, softcap=None, directions=None, **mask):
    """Returns [Tq, H, d] fp64: an explicit softmax over visible keys, for the last Tq positions."""
    out = torch.zeros_like(q, dtype=torch.float64)
    q, k, v = (x.double() for x in (q, k, v))
    first, group = len(k) - len(q), HEADS // k.shape[1]
    for row in range(len(q)):
        i = first + row
        for head in range(HEADS):
            way = directions[head] if directions else "both"
            keys = [j for j in range(len(k)) if sees(i, j, direction=way, **mask)]
            scores = SCALE * (k[keys, head // group] @ q[row, head])
            if terms is not None:
                scores -= SLOPES[head] * torch.tensor([abs(i - j) for j in keys])
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            out[row, head] = scores.softmax(0) @ v[keys, head // group]
    return out


def weights_of(rule, length=10, **options):
    """Returns the attention weights [H, T, T], obtained with the identity in place of values."""
    q, k, _ = qkv(length, HEADS)
    identity = torch.eye(length, dtype=torch.float64)[:, None].expand(-1, HEADS, -1)
    at = torch.arange(length)
    return explicit_attention(q, k, identity, rule, at, at, **options).transpose(0, 1)


# ---- every mask on every path


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_mask_matches_its_pairwise_definition(path, mask, kv_heads):
    q, k, v = qkv(11, kv_heads)
    out = attention(q, k, v, AttentionRule(scale=SCALE, **path, **mask), (11,))
    torch.testing.assert_close(out, by_hand(q, k, v, **path, **mask))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_mask_is_the_same_in_training(path, mask):
    """With gradients and in fp32, where other kernels run."""
    q, k, v = (x.requires_grad_() for x in qkv(21, dtype=torch.float32))
    rule = AttentionRule(scale=SCALE, **path, **mask)
    out = attention(q, k, v, rule, (11, 10))
    parts = zip(*(x.detach().split((11, 10)) for x in (q, k, v)), strict=True)
    expected = torch.cat([by_hand(*part, **path, **mask) for part in parts])
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(
    "mask", [MASKS[n] for n in ("causal", "window", "window and sinks")], ids=str
)
@pytest.mark.parametrize("queries", [1, 4, 11])
def test_a_mask_is_the_same_for_the_last_queries_only(path, mask, queries):
    """As in decoding and in chunked prefill."""
    q, k, v = qkv(11)
    out = attend_segment(q[-queries:], k, v, AttentionRule(scale=SCALE, **path, **mask))
    torch.testing.assert_close(out, by_hand(q[-queries:], k, v, **path, **mask))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_masks_depend_on_key_positions_not_on_their_order_in_memory(path):
    """A query at position 10 sees the same window whether given only keys 6 to 10 or all keys."""
    q, k, v = qkv(11)
    rule = AttentionRule(scale=SCALE, window=4, **path)
    at = torch.arange(6, 11)
    out = attend_segment(q[-2:], k[6:], v[6:], rule, key_positions=at)
    torch.testing.assert_close(out, by_hand(q[-2:], k, v, window=4, **path))


# ---- decoder-only models


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("mask", [MASKS[n] for n in ("causal", "window")], ids=str)
def test_causal_weights_are_triangular_with_the_determinant_of_their_diagonal(path, mask):
    """Every weight on the diagonal is positive, hence full rank."""
    weights = weights_of(AttentionRule(scale=SCALE, **path, **mask))
    assert torch.equal(weights, weights.tril())
    diagonal = weights.diagonal(dim1=1, dim2=2)
    assert (diagonal > 0).all()
    torch.testing.assert_close(torch.linalg.det(weights), diagonal.prod(-1))
    assert torch.linalg.matrix_rank(weights).tolist() == [10] * HEADS
    torch.testing.assert_close(weights.sum(-1), torch.ones(HEADS, 10).double())


@pytest.mark.parametrize("kind", FEATURE_MAPS)
def test_bidirectional_linear_attention_lacks_the_full_rank_of_causal_attention(kind):
    """T tokens with f < T features: the rank is at most f, and exactly f for random tokens."""
    q, k, v = (x[..., :4] for x in qkv(30, HEADS))
    q, k = FEATURE_MAPS[kind].query(q), FEATURE_MAPS[kind].key(k)
    features = Features.plain(q, k, v)
    both_ways = linear_weights(features, FEATURE_MAPS[kind], causal=False)
    assert torch.linalg.matrix_rank(both_ways).tolist() == [q.shape[-1]] * HEADS
    causal = linear_weights(features, FEATURE_MAPS[kind], causal=True)
    assert torch.equal(causal, causal.tril())
    assert (causal.diagonal(dim1=1, dim2=2) > 0).all()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_bidirectional_attention_equals_attention_without_a_mask(kv_heads):
    q, k, v = qkv(14, kv_heads)
    out = attention(q, k, v, AttentionRule(scale=SCALE, causal=False), (14,))
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads, scale=SCALE, enable_gqa=True)
    torch.testing.assert_close(out, expected[0].transpose(0, 1))


PREFIXES = [(0, 0, 0), (1, 1, 1), (4, 1, 7), (9, 0, 12), (2, 1, 0)]


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("prefixes", PREFIXES, ids=str)
@pytest.mark.parametrize(
    "mask",
    [*(MASKS[n] for n in ("causal", "window", "window and sinks")), {"directions": DIRECTIONS}],
    ids=str,
)
def test_the_prefix_mask_equals_unilms(path, prefixes, mask):
    """The first tokens of each packed sequence attend bidirectionally, the rest causally."""
    lengths = (9, 1, 12)
    q, k, v = qkv(sum(lengths))
    rule = AttentionRule(scale=SCALE, **path, **mask)
    out = attention(q, k, v, rule, lengths, prefixes)
    parts = zip(*(x.split(lengths) for x in (q, k, v)), prefixes, strict=True)
    expected = [by_hand(*part, prefix=prefix, **path, **mask) for *part, prefix in parts]
    torch.testing.assert_close(out, torch.cat(expected))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_prefix_mask_is_the_same_in_training(path):
    q, k, v = (x.requires_grad_() for x in qkv(12, dtype=torch.float32))
    out = attention(q, k, v, AttentionRule(scale=SCALE, **path), (12,), (5,))
    expected = by_hand(*(x.detach() for x in (q, k, v)), prefix=5, **path)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_an_empty_prefix_is_causal_and_a_full_prefix_is_bidirectional(path):
    q, k, v = qkv(12)
    causal, both_ways = (AttentionRule(scale=SCALE, causal=c, **path) for c in (True, False))

    def run(rule, prefix=None):
        return attention(q, k, v, rule, (12,), prefix)

    torch.testing.assert_close(run(causal, (0,)), run(causal))
    torch.testing.assert_close(run(causal, (12,)), run(both_ways))
    assert not torch.allclose(run(causal, (6,)), run(causal))
    assert not torch.allclose(run(causal, (6,)), run(both_ways))


def test_the_prefix_mask_matches_its_drawing():
    at = torch.arange(5)
    drawn = visible(at, at, AttentionRule(scale=1.0), prefix=3).int().tolist()
    assert drawn == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


def test_heads_of_a_prefix_mask_match_their_drawing():
    at, ways = torch.arange(4), ("forward", "backward")
    rule = AttentionRule(scale=1.0, directions=ways)
    assert visible(at, at, rule, prefix=3).int().tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
        [[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1]],
    ]
    assert torch.equal(visible(at, at, rule), visible(at, at, AttentionRule(scale=1.0)))


def test_window_and_sinks_match_their_drawing():
    at = torch.arange(6)
    drawn = visible(at, at, AttentionRule(scale=1.0, window=2, num_sinks=1), prefix=0).int()
    assert drawn.tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 1, 1],
    ]


# ---- no leakage between packed sequences

LENGTHS = (6, 9, 5)
CLEAN = torch.tensor([*range(6), *range(15, 20)])


def poisoned(tensors):
    """Returns the tensors with the middle sequence replaced by NaN."""
    copies = [x.clone() for x in tensors]
    for x in copies:
        x[6:15] = math.nan
    return copies


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("prefixes", [None, (3, 3, 3)], ids=["", "prefix"])
def test_nan_in_one_sequence_does_not_reach_others(path, mask, prefixes):
    tensors, rule = qkv(20, dtype=torch.float32), AttentionRule(scale=SCALE, **path, **mask)
    out = attention(*tensors, rule, LENGTHS, prefixes)
    spoiled = attention(*poisoned(tensors), rule, LENGTHS, prefixes)
    assert torch.equal(spoiled[CLEAN], out[CLEAN])
    assert spoiled[6:15].isnan().all()


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_nan_in_one_sequence_does_not_reach_gradients_of_others(path, mask):
    rule = AttentionRule(scale=SCALE, **path, **mask)

    def gradients(tensors):
        leaves = [x.requires_grad_() for x in tensors]
        out = attention(*leaves, rule, LENGTHS)
        return torch.autograd.grad(out[CLEAN].square().sum(), leaves)

    clean = gradients(qkv(20, dtype=torch.float32))
    spoiled = gradients(poisoned(qkv(20, dtype=torch.float32)))
    for a, b in zip(spoiled, clean, strict=True):
        assert torch.equal(a[CLEAN], b[CLEAN])
        assert b[CLEAN].isfinite().all()
