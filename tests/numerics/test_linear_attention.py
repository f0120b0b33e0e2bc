"""The forms of linear attention are equal, and each kind follows its equation."""

import pytest
import torch

from easyllm.nn.config import LinearAttentionConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.linear_attention import LinearAttention
from easyllm.nn.position_config import Rope
from easyllm.ops.linear_attention import (
    FEATURE_MAPS,
    Features,
    bidirectional,
    cumulative,
    quadratic,
    recurrent,
    weights,
)

KINDS = list(FEATURE_MAPS)


def features(kind, length=37, *, rotated=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(length, 3, 8, generator=generator, dtype=dtype) for _ in range(3))
    q, k = FEATURE_MAPS[kind].query(q), FEATURE_MAPS[kind].key(k)
    if not rotated:
        return Features.plain(q, k, v)
    angle = torch.arange(length, dtype=dtype)[:, None, None] * 0.1
    return Features(q=q, k=k, v=v, rotated_q=q * angle.cos(), rotated_k=k * angle.cos())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recurrent_cumulative_and_quadratic_forms_are_equal(kind, rotated, dtype):
    x = features(kind, rotated=rotated, dtype=dtype)
    exact = quadratic(x, FEATURE_MAPS[kind], causal=True)
    for chunk in (1, 5, 64):
        out, state = cumulative(x, FEATURE_MAPS[kind], chunk=chunk)
        torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-5)
    step, last = recurrent(x, FEATURE_MAPS[kind])
    torch.testing.assert_close(step, exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last.outer, state.outer, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last.total, state.total, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bidirectional_equals_quadratic(kind):
    x = features(kind)
    exact = quadratic(x, FEATURE_MAPS[kind], causal=False)
    torch.testing.assert_close(bidirectional(x, FEATURE_MAPS[kind]), exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
def test_weights_are_not_negative_and_rows_sum_to_one(kind, causal):
    found = weights(features(kind), FEATURE_MAPS[kind], causal=causal)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 37).double(), atol=1e-5, rtol=0)


def test_softmax_features_apply_softmax_over_features_and_over_positions():
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(20, 1, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = q[:, 0].softmax(-1) @ (k[:, 0].softmax(0).T @ v[:, 0])
    kind = FEATURE_MAPS["softmax"]
    out = bidirectional(Features.plain(kind.query(q), kind.key(k), v), kind)
    torch.testing.assert_close(out[:, 0], expected)


def test_cosine_weights_are_one_plus_the_cosine():
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(5, 1, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    kind = FEATURE_MAPS["cosine"]
    product = (kind.query(q)[:, 0] @ kind.key(k)[:, 0].T).flatten()
    cosine = torch.nn.functional.cosine_similarity(q, k.transpose(0, 1), dim=-1).flatten()
    torch.testing.assert_close(product, 1 + cosine)


def test_bidirectional_linear_attention_has_rank_at_most_its_features():
    """Unlike causal softmax, its weights therefore cannot be triangular with positive diagonal."""
    found = weights(features("elu"), FEATURE_MAPS["elu"], causal=False)
    assert int(torch.linalg.matrix_rank(found[0])) <= 8


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_isolated(kind):
    position = Rope() if kind == "elu" else None
    options = {"position": position} if position else {}
    config = LinearAttentionConfig(num_heads=2, head_dim=8, features=kind, **options)
    layer = LinearAttention(config, 16, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(25, 16)
    packed = layer(x, ForwardContext.packed([10, 15]))
    alone = torch.cat([layer(p, ForwardContext.packed([len(p)])) for p in x.split([10, 15])])
    torch.testing.assert_close(packed, alone)
