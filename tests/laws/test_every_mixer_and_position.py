"""Laws 2 and 3 for every part of a decoder: packed = alone, prefill + decode = one full forward.

The models are tiny, random and in fp64, so that any difference beyond rounding is a logic error.
"""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch

from easyllm.batches.packing import pack
from easyllm.batches.shared_prompts import shares_prompts
from easyllm.engine.runner import logits_in_passes
from easyllm.examples.sample import Sample
from easyllm.nn.config import (
    AttentionConfig,
    GLUConfig,
    LatentAttentionConfig,
    LayerConfig,
    LayerNormConfig,
    LinearAttentionConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    PartialRMSNormConfig,
    RMSNormConfig,
)
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.nn.position_config import (
    Alibi,
    BlockRope,
    DebertaRelative,
    DynamicNTKScaling,
    FactorScaling,
    Learned,
    LinearScaling,
    Llama3Scaling,
    NoPosition,
    NTKScaling,
    ReRope,
    Rope,
    Shaw,
    Sinusoidal,
    StreamingRope,
    T5Bias,
    TransformerXL,
    YarnScaling,
)
from prefix_batches import PREFIX, batch_of, loss_gradients_and_rows

pytestmark = pytest.mark.usefixtures("one_thread")  # the models are too small to parallelise

VOCAB = 50
LENGTHS = (21, 1, 34, 6)
EXACT = {"atol": 1e-9, "rtol": 0}


def attention(heads=4, kv_heads=2, **options):
    return {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 8} | options


MIXERS = {
    "mha": attention(kv_heads=4),
    "gqa": attention(),
    "mqa": attention(kv_heads=1),
    "six heads": attention(heads=6, kv_heads=3),
    "window": attention(window=5),
    "window and sinks": attention(window=5, num_sinks=2),
    "soft cap": attention(softcap=1.5),
    "qk norm": attention(qk_norm=RMSNormConfig()),
    "log-n": attention(logn_length=4),
    "window, soft cap, biases": attention(window=7, softcap=2.0, qkv_bias=True, out_bias=True),
}
ROPES = {
    "rope": Rope(),
    "interleaved rope": Rope(interleaved=True),
    "partial rope": Rope(rotary_dim=4),
    "partial interleaved rope": Rope(rotary_dim=6, interleaved=True, theta=100.0),
    "linear": Rope(scaling=LinearScaling(factor=4.0)),
    "ntk": Rope(scaling=NTKScaling(factor=4.0)),
    "dynamic ntk within": Rope(scaling=DynamicNTKScaling(factor=4.0, original_max_seq_len=64)),
    "yarn": Rope(scaling=YarnScaling(factor=4.0, original_max_seq_len=16)),
    "factors": Rope(scaling=FactorScaling(factors=(1.0, 1.5, 4.0, 7.0))),
    "llama3": Rope(
        scaling=Llama3Scaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16
        )
    ),
}
SCORE_POSITIONS = {
    "alibi": Alibi(),
    "t5 bias": T5Bias(num_buckets=8, max_distance=16),
    "shaw": Shaw(max_distance=3),
    "shaw, keys alone": Shaw(max_distance=3, values=False),
    "none": NoPosition(),
}
RELATIVE = (TransformerXL(), DebertaRelative(max_distance=5))
REROPES = {"rerope": ReRope(window=6), "leaky rerope": ReRope(window=6, leak=3.0)}
EMBEDDED = {"learned": Learned(), "sinusoidal": Sinusoidal()}
"""Positions added to the embedding."""
LINEAR = {
    **{f"linear {name}": {"features": name} for name in ("elu", "softmax", "cosine")},
    "linear elu, rope": {"position": Rope()},
    "linear elu, interleaved rope": {"position": Rope(interleaved=True)},
    "linear elu, partial rope": {"position": Rope(rotary_dim=4)},
    "linear, biases": {"qkv_bias": True, "out_bias": True},
}
GLU = GLUConfig(intermediate_size=24)
MOE = {"num_experts": 4, "experts_per_token": 2, "expert": GLUConfig(intermediate_size=12)}
FEED_FORWARDS = {
    "swiglu": GLU,
    "geglu, biases": GLUConfig(intermediate_size=24, activation="gelu", bias=True),
    "mlp": MLPConfig(intermediate_size=24),
    "relu mlp, no bias": MLPConfig(intermediate_size=24, activation="relu", bias=False),
    "moe": MoEConfig(**MOE),
    "moe of one expert a token": MoEConfig(**MOE | {"experts_per_token": 1}, normalise=False),
    "moe, top-k before softmax": MoEConfig(**MOE, routing="topk_softmax"),
    "moe, shared expert": MoEConfig(**MOE, shared=GLU),
    "moe, gated shared expert": MoEConfig(**MOE, shared=GLU, shared_gate=True),
    "moe, groups": MoEConfig(**MOE, num_groups=2, groups_per_token=1, scale=1.5),
    "moe, sigmoids with a bias": MoEConfig(
        **MOE, routing="sigmoid_topk", selection_bias=True, num_groups=2, group_score="best_two"
    ),
}
NORMS = {
    "rms": RMSNormConfig(),
    "offset rms": RMSNormConfig(unit_offset=True),
    "layer norm": LayerNormConfig(),
    "layer norm, no bias": LayerNormConfig(bias=False),
}
ATTENTION = AttentionConfig(**attention())
WIDTHS = {"num_heads": 4, "kv_rank": 12, "nope_dim": 6, "rope_dim": 4, "value_dim": 7}
LATENT = {
    "latent": {},
    "latent, latent queries, biases": {"q_rank": 10, "bias": True},
    "latent, wide values, yarn": {
        "value_dim": 15,
        "mscale": 0.7,
        "position": Rope(scaling=YarnScaling(factor=4.0, original_max_seq_len=16)),
    },
}


def model_config(*mixers, feed_forward=GLU, norm_placement="pre", **options):
    """Returns two layers of one mixer, or one layer per mixer."""
    mixers = mixers * 2 if len(mixers) == 1 else mixers
    layers = [
        LayerConfig(mixer=mixer, feed_forward=feed_forward, norm_placement=norm_placement)
        for mixer in mixers
    ]
    values = {"family": "llama", "vocab_size": VOCAB, "hidden_size": 16, "max_seq_len": 64}
    return ModelConfig(**values | {"layers": tuple(layers)} | options)


def softmax_variants(positions):
    return {
        f"{mixer}; {position}": model_config(AttentionConfig(**options, position=kind))
        for mixer, options in MIXERS.items()
        for position, kind in positions.items()
    }


def embedded_variants():
    mixers = {
        name: AttentionConfig(**options, position=NoPosition()) for name, options in MIXERS.items()
    }
    mixers["linear"] = LinearAttentionConfig(num_heads=2, head_dim=8)
    return {
        f"{name}; {position}": model_config(mixer, embedding_position=kind)
        for name, mixer in mixers.items()
        for position, kind in EMBEDDED.items()
    }


def linear_variants():
    return {
        name: model_config(LinearAttentionConfig(num_heads=2, head_dim=8, **options))
        for name, options in LINEAR.items()
    }


def latent_variants():
    return {
        name: model_config(LatentAttentionConfig(**WIDTHS | options))
        for name, options in LATENT.items()
    }


def layer_variants():
    """Yields feed-forwards, norms and their placement, and layers that differ from each other."""
    variants = {
        name: model_config(ATTENTION, feed_forward=kind) for name, kind in FEED_FORWARDS.items()
    }
    for placement in ("pre", "post", "sandwich"):
        for name, norm in NORMS.items():
            variants[f"{placement}; {name}"] = model_config(
                ATTENTION, norm=norm, norm_placement=placement, final_norm=placement != "post"
            )
    deep = model_config(ATTENTION, norm=LayerNormConfig(), norm_placement="post", final_norm=False)
    scaled = [layer.model_copy(update={"residual_scale": 2.0}) for layer in deep.layers]
    variants["deep norm, embedding norm"] = deep.changed(layers=scaled, embedding_norm=True)
    variants["norm head"] = model_config(ATTENTION, normalise_head=True)
    for kind in RELATIVE:
        variants[kind.kind] = model_config(AttentionConfig(**attention(), position=kind))
    variants["partial rms"] = model_config(ATTENTION, norm=PartialRMSNormConfig(share=0.3))
    variants["block rope"] = model_config(AttentionConfig(**attention(), position=BlockRope()))
    window = AttentionConfig(**attention(window=5), position=Rope(theta=100.0))
    linear = LinearAttentionConfig(num_heads=2, head_dim=8, position=Rope())
    alibi = AttentionConfig(**attention(), position=Alibi())
    return variants | {
        "window, then all with another base": model_config(window, ATTENTION),
        "linear, then softmax": model_config(linear, ATTENTION),
        "alibi, window, linear": model_config(alibi, window, linear),
        "tied, scaled embedding, capped logits": model_config(
            ATTENTION, tie_embeddings=True, embedding_scale=4.0, logit_softcap=5.0
        ),
    }


def bidirectional_variants():
    """Yields models whose tokens all see each other: they can be packed, but have no KV cache."""
    options = attention(causal=False)
    variants = {
        f"bidirectional; {name}": model_config(AttentionConfig(**options, position=kind))
        for name, kind in (ROPES | SCORE_POSITIONS).items()
    }
    for kind in RELATIVE:
        mixer = AttentionConfig(**options, position=kind)
        variants[f"bidirectional {kind.kind}"] = model_config(mixer)
    for name in ("window", "soft cap"):
        mixer = AttentionConfig(**MIXERS[name], causal=False)
        variants[f"bidirectional {name}"] = model_config(mixer)
    for name, linear in LINEAR.items():
        mixer = LinearAttentionConfig(num_heads=2, head_dim=8, causal=False, **linear)
        variants[f"bidirectional {name}"] = model_config(mixer)
    return variants


CAUSAL = {
    **softmax_variants(ROPES | SCORE_POSITIONS),
    **embedded_variants(),
    **linear_variants(),
    **latent_variants(),
    **layer_variants(),
}
STREAMING = {
    f"streaming, {sinks} sinks": model_config(
        AttentionConfig(**attention(window=9, num_sinks=sinks, position=StreamingRope()))
    )
    for sinks in (0, 3)
}
RECTIFIED = softmax_variants(REROPES) | STREAMING
BIDIRECTIONAL = bidirectional_variants()
VARIANTS = CAUSAL | RECTIFIED | BIDIRECTIONAL


def build(config):
    """Returns a random fp64 model in which every part matters: no parameter is zero or one."""
    model = Decoder(config).double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        low, high = (0.5, 1.5) if "norm" in name and name.endswith("weight") else (-0.7, 0.7)
        torch.nn.init.uniform_(parameter, low, high, generator=generator)
    for buffer in model.buffers():
        torch.nn.init.uniform_(buffer, generator=generator)
    return model.requires_grad_(False).eval()


@cache
def model_of(name):
    return build(VARIANTS[name])


def sequences(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


@cache
def alone(name):
    """Returns logits [T, V] of each sequence by itself: the reference."""
    return [model_of(name).logits(ids) for ids in sequences()]


def pack_ids(parts):
    return pack([Sample(tuple(ids), tuple(ids)) for ids in parts])


def packed_logits(model, parts):
    batch = pack_ids(parts)
    return model.head(model(batch.token_ids, batch.context())).split(batch.lengths)


def assert_equal(ours, expected, tolerance=EXACT):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# ---- law 2


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_sequences_equal_each_alone(name):
    assert_equal(packed_logits(model_of(name), sequences()), alone(name))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_leak_across_the_boundary_would_be_detected(name):
    """Negative control: the same tokens and positions as one sequence, where later ones see all."""
    model, batch = model_of(name), pack_ids(sequences())
    leaky = ForwardContext(positions=batch.positions, lengths=(len(batch.token_ids),))
    logits = model.head(model(batch.token_ids, leaky)).split(batch.lengths)
    assert (logits[1] - alone(name)[1]).abs().max() > 1e-4


@pytest.mark.parametrize("labelled_prefix", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_common_prefix_computed_once_gives_the_same_loss_and_gradients(name, labelled_prefix):
    model = copy.deepcopy(model_of(name)).requires_grad_(True)
    batch = batch_of(VOCAB, labelled_prefix=labelled_prefix)
    assert batch.common_prefix == PREFIX
    shared, found, rows = loss_gradients_and_rows(model, batch)
    whole, expected, all_rows = loss_gradients_and_rows(model, replace(batch, common_prefix=0))
    tokens = len(batch.token_ids)
    saved = 3 * PREFIX if shares_prompts(model.config, 0) else 0
    assert (rows, all_rows) == ([tokens - saved], [tokens])
    assert shared.num_tokens == whole.num_tokens == batch.num_trained
    torch.testing.assert_close(shared.sum, whole.sum, atol=1e-9, rtol=0)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-9)


# ---- law 3

PIECES = {
    "unchunked prefill, decode": [(14, *[1] * 7), (1,), (29, *[1] * 5), (3, 1, 1, 1)],
    "prefill in uneven pieces": [(2, 9, 1, 7, 1, 1), (1,), (11, 1, 17, 5), (1, 2, 3)],
}


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_the_cache_equals_one_forward(name, pieces):
    assert_equal(logits_in_passes(model_of(name), sequences(), pieces), alone(name))


@pytest.mark.parametrize("name", RECTIFIED)
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_the_cache_equals_one_forward_for_rectified_rope(name, pieces):
    """A single query is rotated by another formula, with fp32 angles (1e-5 was measured)."""
    ours = logits_in_passes(model_of(name), sequences(), pieces)
    assert_equal(ours, alone(name), {"atol": 5e-5, "rtol": 0})


LONG = ["gqa; rope", "window; alibi", "window and sinks; yarn", "mqa; shaw", "linear elu, rope"]


@pytest.mark.parametrize("name", LONG)
def test_the_cache_equals_one_forward_over_many_pages(name):
    """Passes begin and end inside pages, windows span many, linear attention has several chunks."""
    model, parts = model_of(name), sequences((150, 131))
    pieces = [(63, 1, 1, 1, 70, 14), (1, 129, 1)]
    ours = logits_in_passes(model, parts, pieces)
    assert_equal(ours, [model.logits(ids) for ids in parts])


def test_the_cache_equals_one_forward_with_expert_capacity():
    """The capacity is a share of a pass's tokens, and must not be 0 for a single token."""
    experts = MoEConfig(**MOE, capacity_factor=1.25)
    model, parts = build(model_config(ATTENTION, feed_forward=experts)), sequences((20,))
    ours = logits_in_passes(model, parts, [(16, 1, 1, 1, 1)])
    assert_equal(ours, [model.logits(ids) for ids in parts], {"atol": 1e-5, "rtol": 0})


# ---- dynamic NTK, whose base depends on the length


def dynamic_model(scaling):
    return build(model_config(AttentionConfig(**attention(), position=Rope(scaling=scaling))))


DYNAMIC = DynamicNTKScaling(factor=4.0, original_max_seq_len=16)


@pytest.mark.parametrize("length", [17, 34, 60])
def test_dynamic_ntk_beyond_the_original_length_is_ntk_of_that_length(length):
    (ids,) = sequences((length,))
    same = NTKScaling(factor=4.0 * length / 16 - 3.0)
    logits = dynamic_model(DYNAMIC).logits(ids)
    torch.testing.assert_close(logits, dynamic_model(same).logits(ids), **EXACT)
    assert (logits - dynamic_model(None).logits(ids)).abs().max() > 1e-3


def test_dynamic_ntk_within_the_original_length_is_plain_rope():
    (ids,) = sequences((16,))
    torch.testing.assert_close(dynamic_model(DYNAMIC).logits(ids), dynamic_model(None).logits(ids))


def test_dynamic_ntk_depends_only_on_the_sequences_own_length_when_packed():
    """Law 2 where some sequences of the batch exceed the original length and others do not."""
    model, parts = dynamic_model(DYNAMIC), sequences((34, 12, 21))
    assert_equal(packed_logits(model, parts), [model.logits(ids) for ids in parts])
