"""FlashAttention's algorithm equals dense attention at every tile size, forward and backward."""

import pytest
import torch

from easyllm.ops.attention import reference_attention
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.tiled_attention import tiled_attention

pytestmark = pytest.mark.usefixtures("two_threads")  # kernels split their work

RULES = {
    "causal": AttentionRule(scale=0.3),
    "bidirectional": AttentionRule(scale=0.3, causal=False),
    "window": AttentionRule(scale=0.3, window=5),
    "window and sinks": AttentionRule(scale=0.3, window=5, num_sinks=2),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("tiles", [(1, 1), (3, 7), (16, 4), (64, 64)])
@pytest.mark.parametrize("queries", [23, 5])
def test_tiled_equals_dense_with_gradients(rule, tiles, queries):
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = leaf(queries, 4, 8), leaf(23, 2, 8), leaf(23, 2, 8)
    out = tiled_attention(q, k, v, rule, query_tile=tiles[0], key_tile=tiles[1])
    expected = reference_attention(q, k, v, rule)
    torch.testing.assert_close(out, expected)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad(out, (q, k, v), grad)
    theirs = torch.autograd.grad(expected, (q, k, v), grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_no_square_matrix_is_allocated(monkeypatch):
    """The largest tensor of either pass has as many columns as a tile, not as the sequence."""
    largest = 0
    real = torch.Tensor.masked_fill

    def spy(self, *args):
        nonlocal largest
        largest = max(largest, self.numel())
        return real(self, *args)

    monkeypatch.setattr(torch.Tensor, "masked_fill", spy)
    q, k, v = (torch.randn(200, 1, 8, requires_grad=True) for _ in range(3))
    tiled_attention(q, k, v, AttentionRule(scale=0.3), query_tile=16, key_tile=16).sum().backward()
    assert largest == 16 * 16
