"""Positional encodings against their equations, published figures and `transformers`."""

import math

import pytest
import torch
from transformers import AutoConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

from easyllm.core.errors import ConfigError
from easyllm.models.families.rope_config import read_rope, write_rope
from easyllm.nn.context import ForwardContext
from easyllm.nn.embedding_position import build_embedding_position
from easyllm.nn.position import (
    AlibiPosition,
    ReRopePosition,
    RotaryPosition,
    ShawPosition,
    StreamingPosition,
    T5Position,
    alibi_slopes,
    t5_buckets,
)
from easyllm.nn.position_config import (
    Learned,
    ReRope,
    Rope,
    Shaw,
    Sinusoidal,
    StreamingRope,
    T5Bias,
)
from easyllm.nn.rope_scaling import (
    critical_dim,
    frequencies,
    ntk_base,
    rope_frequencies,
    yarn_attention_factor,
)
from easyllm.ops.attention import explicit_attention
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.rotary import apply_rotary


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- T5's relative position buckets


def test_t5_bidirectional_buckets_of_distances_0_to_30_have_their_published_values():
    buckets = t5_buckets(-torch.arange(31), bidirectional=True).tolist()
    assert buckets == [*range(8), *[8] * 4, *[9] * 4, *[10] * 7, *[11] * 8]


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_buckets_equal_transformers(bidirectional):
    relative = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(relative, bidirectional, 32, 128)
    assert torch.equal(t5_buckets(relative, bidirectional=bidirectional), expected)


def test_t5_bias_is_the_table_entry_of_the_bucket():
    position = T5Position(T5Bias(), num_heads=3, causal=True)
    position.reset_parameters()
    bias = position.bias(torch.tensor([5]), torch.arange(6))
    assert bias.shape == (3, 1, 6)
    assert torch.equal(bias[:, 0, 5], position.bias_table[0])  # distance 0
    assert torch.equal(bias[:, 0, 0], position.bias_table[5])  # distance 5, still exact


# ---- absolute positions, added to the embedding


def test_a_position_beyond_the_learned_table_is_refused():
    table = build_embedding_position(Learned(), 8, 4)
    table.reset_parameters()
    assert torch.equal(table(torch.zeros(2, 4), torch.tensor([0, 7])), table.weight[[0, 7]])
    with pytest.raises(ConfigError, match="position 8 is beyond the learned table of 8"):
        table(torch.zeros(1, 4), torch.tensor([8]))


def test_sinusoidal_dot_products_depend_on_the_distance_and_shifts_are_linear():
    width = 16
    embedding = build_embedding_position(Sinusoidal(), 0, width)
    table = embedding.table(torch.arange(50)).double()
    omega = 10000 ** (-torch.arange(0, width, 2).double() / width)
    for t, k in ((0, 0), (3, 7), (20, 29)):
        expected = torch.cos(k * omega).sum()
        torch.testing.assert_close(table[t] @ table[t + k], expected, atol=1e-4, rtol=0)
    # a single matrix maps PE(t) to PE(t + 5) for every t
    turn = torch.linalg.lstsq(table[:40], table[5:45]).solution
    torch.testing.assert_close(table[:40] @ turn, table[5:45], atol=1e-4, rtol=0)


# ---- relative positions


def test_alibi_slopes_of_8_and_40_heads_have_their_published_values():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    for heads in (3, 12, 20, 40, 64):
        expected = build_alibi_tensor(torch.ones(1, 5), heads, torch.float32)[:, 0, :]
        torch.testing.assert_close(alibi_slopes(heads)[:, None] * torch.arange(5), expected)


def test_alibi_bias_falls_with_the_distance():
    bias = AlibiPosition(8).bias(torch.tensor([4]), torch.arange(5))
    assert bias[0, 0].tolist() == [-2.0, -1.5, -1.0, -0.5, 0.0]


def test_shaw_equals_its_explicit_sums():
    position = ShawPosition(Shaw(max_distance=2), head_dim=4).double()
    position.reset_parameters()
    q, k, v = randn(6, 2, 4), randn(6, 2, 4, seed=1), randn(6, 2, 4, seed=2)
    rule = AttentionRule(scale=0.5, terms=position.terms)
    at = torch.arange(6)
    out = explicit_attention(q, k, v, rule, at, at)
    for head in range(2):
        for i in range(6):
            rows = [max(-2, j - i) + 2 for j in range(i + 1)]
            keys = k[: i + 1, head] + position.key_vectors[rows]
            weights = (keys @ q[i, head] * 0.5).softmax(0)
            expected = weights @ (v[: i + 1, head] + position.value_vectors[rows])
            torch.testing.assert_close(out[i, head], expected)


# ---- RoPE


def turned(x, position, positions):
    context = ForwardContext(positions=positions, lengths=(len(positions),))
    return position.rotate(x, context)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_dot_products_depend_only_on_the_distance_and_norms_are_preserved(interleaved):
    position = RotaryPosition(Rope(interleaved=interleaved), 16)
    q, k = randn(1, 1, 16), randn(1, 1, 16, seed=1)

    def product(m, n):
        a = turned(q, position, torch.tensor([m]))
        return (a * turned(k, position, torch.tensor([n]))).sum()

    torch.testing.assert_close(product(7, 3), product(104, 100), atol=1e-5, rtol=0)
    assert abs(product(7, 3) - product(7, 4)) > 1e-3
    norm = turned(q, position, torch.tensor([1000])).norm()
    torch.testing.assert_close(norm, q.norm(), atol=1e-5, rtol=0)


def test_the_two_rope_layouts_are_equal_up_to_a_permutation():
    x, positions = randn(9, 2, 16), torch.arange(9)
    order = torch.cat([torch.arange(0, 16, 2), torch.arange(1, 16, 2)])
    paper = turned(x, RotaryPosition(Rope(interleaved=True), 16), positions)
    half = turned(x[..., order].contiguous(), RotaryPosition(Rope(), 16), positions)
    torch.testing.assert_close(half, paper[..., order])


def test_rotation_equals_transformers():
    q, k = randn(12, 4, 16).float(), randn(12, 2, 16, seed=1).float()
    position = RotaryPosition(Rope(theta=5000.0), 16)
    cos, sin = position.tables(ForwardContext.packed([12]))
    theirs = apply_rotary_pos_emb(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        torch.cat([cos, cos], -1)[None],
        torch.cat([sin, sin], -1)[None],
    )
    for x, expected in zip((q, k), theirs, strict=True):
        torch.testing.assert_close(apply_rotary(x, cos, sin), expected[0].transpose(0, 1))


def test_partial_rotary_leaves_the_rest_of_a_head_unchanged():
    x = randn(5, 2, 16)
    out = turned(x, RotaryPosition(Rope(rotary_dim=6), 16), torch.arange(5))
    assert torch.equal(out[..., 6:], x[..., 6:])
    assert not torch.equal(out[1:, :, :6], x[1:, :, :6])


# ---- ReRoPE


@pytest.mark.parametrize("leak", [None, 4.0])
def test_rerope_within_its_window_is_rope(leak):
    q, k = randn(2, 10, 16), randn(2, 10, 16, seed=1)
    rerope = ReRopePosition(ReRope(window=10, leak=leak), 16)
    at = torch.arange(10)
    rope = RotaryPosition(Rope(), 16)
    a, b = (turned(x.transpose(0, 1), rope, at).transpose(0, 1) for x in (q, k))
    lower = torch.ones(10, 10).tril().bool()
    expected = (a @ b.mT)[:, lower]
    torch.testing.assert_close(rerope.scores(q, k, at, at)[:, lower], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("leak", [None, 3.0])
def test_the_decoding_form_of_rerope_equals_the_two_matrices(leak):
    q, k = randn(2, 30, 16), randn(2, 30, 16, seed=1)
    rerope = ReRopePosition(ReRope(window=8, leak=leak), 16)
    at = torch.arange(30)
    whole = rerope.near_far_scores(q, k, at, at)
    for i in (0, 7, 8, 29):
        row = rerope.decode_scores(q[:, i : i + 1], k[:, : i + 1], at[i : i + 1], at[: i + 1])
        torch.testing.assert_close(row[:, 0], whole[:, i, : i + 1], atol=1e-4, rtol=0)


def test_rerope_clips_distances_beyond_the_window():
    q, k = randn(1, 1, 16), randn(1, 1, 16, seed=1).expand(1, 40, 16)
    rerope = ReRopePosition(ReRope(window=8), 16)
    row = rerope.decode_scores(q, k, torch.tensor([39]), torch.arange(40))[0, 0]
    assert torch.allclose(row[: 40 - 8], row[0].expand(32), atol=1e-6)
    assert not torch.allclose(row[-1], row[0], atol=1e-3)


# ---- RoPE scaling


def test_rope_scaling_has_its_published_values():
    for factor, base in ((2, 20221.26), (4, 40889.94), (8, 82684.62)):
        assert round(ntk_base(10000, 128, factor), 2) == base
    values = {"rope_type": "yarn", "original_max_position_embeddings": 4096}
    for factor, expected in ((4, 1.1386), (16, 1.2773)):
        rope = read_rope({"rope_scaling": values | {"factor": factor}}, 128)
        assert round(yarn_attention_factor(rope.scaling), 4) == expected
    assert critical_dim(10000, 128, 4096) == 92


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, other bounds": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "attention_factor": 1.5,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize("length", [64, 200])
def test_scaled_frequencies_equal_transformers(scaling, length):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    hf = AutoConfig.for_model(
        "llama",
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=64,
        rope_parameters=scaling | {"rope_theta": 10000.0},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](hf, "cpu", seq_len=length)
    rope = read_rope(hf.to_dict(), 64)
    ours, our_factor = rope_frequencies(rope, 64, length)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(factor)
    assert read_rope(write_rope(rope, 64) | {"max_position_embeddings": 64}, 64) == rope


def test_both_spellings_of_the_rope_configuration_are_equivalent():
    for scaling in SCALINGS.values():
        old = {"rope_theta": 7.0, "rope_scaling": scaling, "max_position_embeddings": 64}
        new = {"rope_parameters": scaling | {"rope_theta": 7.0}, "max_position_embeddings": 64}
        assert read_rope(old, 64) == read_rope(new, 64)


def test_frequencies_decrease_from_one():
    values = frequencies(10000.0, 64)
    assert values[0] == 1.0
    assert math.isclose(values[-1], 10000 ** (-62 / 64), rel_tol=1e-6)


# ---- positions inside the cache (StreamingLLM)


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("chunk", [1, 5, 40])
def test_streaming_positions_equal_a_manually_managed_cache(sinks, chunk):
    """One token at a time: sinks and the last tokens in a list, rotated by their index in it."""
    window, length, dim = 6, 40, 8
    position = StreamingPosition(StreamingRope(), dim, window=window, num_sinks=sinks)
    rule = AttentionRule(
        scale=dim**-0.5, causal=True, window=window, num_sinks=sinks, terms=position.terms
    )
    q, k, v = randn(length, 2, dim), randn(length, 2, dim, seed=1), randn(length, 2, dim, seed=2)
    frequency = frequencies(10000.0, dim).double()

    def turned(x, place):
        angle = place * frequency
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    expected, cache = [], []
    for i in range(length):
        cache.append(i)
        if len(cache) > sinks + window:
            del cache[sinks]
        keys = torch.stack([turned(k[j], place) for place, j in enumerate(cache)])  # [n, 2, d]
        scores = torch.einsum("hd,nhd->hn", turned(q[i], len(cache) - 1), keys) * dim**-0.5
        expected.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), v[cache]))
    at = torch.arange(length)
    out = [
        explicit_attention(q[i : i + chunk], k, v, rule, at[i : i + chunk], at)
        for i in range(0, length, chunk)
    ]
    torch.testing.assert_close(torch.cat(out), torch.stack(expected), atol=1e-6, rtol=0)


def test_streaming_positions_equal_rope_until_the_cache_is_full():
    position = StreamingPosition(StreamingRope(), 8, window=6, num_sinks=2)
    q, k, at = randn(2, 8, 8), randn(2, 8, 8, seed=1), torch.arange(8)
    plain = RotaryPosition(Rope(), 8)
    context = ForwardContext.packed([8])
    turned = [plain.rotate(x.transpose(0, 1), context).transpose(0, 1) for x in (q, k)]
    torch.testing.assert_close(
        position.scores(q, k, at, at), turned[0] @ turned[1].mT, atol=1e-5, rtol=0
    )
