"""S²-Attn: attention in shifted groups equals a mask by head, in training alone."""

import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.nn.context import ForwardContext
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.shifted_attention import shifted_attention
from easyllm.train.factories import shift_attention
from tiny_models import build_tiny


@pytest.mark.parametrize("lengths", [(10,), (1, 7, 16, 3)])
def test_it_is_attention_under_a_mask_by_head(lengths):
    group, total = 4, sum(lengths)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(total, h, 8, generator=generator) for h in (4, 2, 2))
    rule = AttentionRule(scale=8**-0.5)
    out = shifted_attention(q, k, v, rule, lengths, group)
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    at = torch.cat([torch.arange(n) for n in lengths])
    for head in range(4):
        shift = group // 2 if head >= 2 else 0
        its = torch.div(at + shift, group, rounding_mode="floor")
        mask = (sequence[:, None] == sequence) & (its[:, None] == its) & (at[:, None] >= at)
        scores = (q[:, head] @ k[:, head // 2].T) * rule.scale
        expected = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v[:, head // 2]
        torch.testing.assert_close(out[:, head], expected, atol=1e-5, rtol=1e-5)


def test_a_trained_model_attends_in_groups_and_a_served_one_to_everything():
    model, ids = build_tiny(), torch.arange(5, 37)
    context = ForwardContext.packed([32])
    whole = model(ids, context)
    shift_attention(model, 8)
    assert torch.equal(model(ids, context), whole)
    model.train()
    near = model(ids, context)
    assert not torch.allclose(near, whole, atol=1e-3)
    # in the first group of the first layer nothing is hidden
    torch.testing.assert_close(near[:4], whole[:4], atol=1e-5, rtol=1e-5)


def test_an_odd_number_of_heads_is_refused():
    with pytest.raises(ConfigError, match="does not support an odd number of heads"):
        shift_attention(build_tiny(num_key_value_heads=1), 8)
