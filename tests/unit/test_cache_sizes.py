"""What the cache holds and how many bytes that is, asked of the real caches (big ones on the `meta` device)."""

import pytest
import torch
from torch import Tensor

from easyllm.engine.kv_cache import BatchCache, GrowingKeys, RollingKeys, SequenceCache
from easyllm.models.families import FAMILIES, family_of
from easyllm.nn.config import (
    AttentionConfig,
    GLUConfig,
    LayerConfig,
    LinearAttentionConfig,
    ModelConfig,
)
from easyllm.nn.decoder import Decoder
from easyllm.ops.attention import AttentionContext, AttentionRule, attend_segment
from easyllm.ops.linear_attention import LinearState

SIZES = {name: size for family in FAMILIES.values() for name, size in family.sizes.items()}
META = torch.device("meta")
CPU = torch.device("cpu")
GIB = 2**30


def config_of(name, **changes):
    size = SIZES[name] | changes
    return family_of(size["model_type"]).read_config(size)


def cached_bytes(config, num_tokens, dtype=torch.float16):
    """Bytes of the keys and values all layers give to attention once `num_tokens` went in, in one piece."""
    total = 0
    for layer, store in zip(config.layers, SequenceCache(config, dtype, META).keys, strict=True):
        shape = (num_tokens, layer.mixer.num_kv_heads, layer.mixer.head_dim)
        keys, values, _ = store.extend(*(torch.empty(shape, dtype=dtype, device=META),) * 2)
        total += keys.nbytes + values.nbytes
    return total


def held_bytes(cache):
    """Bytes of every tensor a cache owns, used or not."""
    held = [value for store in cache.keys if store for value in vars(store).values()]
    return sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))


# ---- topic 5: MQA and GQA

PER_TOKEN = {
    "llama2-70b, 64 heads": ("llama2-70b", 64, 2_621_440),
    "llama2-70b as it is, 8": ("llama2-70b", None, 327_680),
    "llama2-70b, 1 head": ("llama2-70b", 1, 40_960),
    "smollm2, 9 heads": ("smollm2-135m", 9, 69_120),
    "smollm2 as it is, 3": ("smollm2-135m", None, 23_040),
}


@pytest.mark.parametrize(("name", "kv_heads", "expected"), PER_TOKEN.values(), ids=PER_TOKEN)
def test_topic_5_bytes_a_token_in_fp16(name, kv_heads, expected):
    config = config_of(name, **{"num_key_value_heads": kv_heads} if kv_heads else {})
    assert cached_bytes(config, 1) == expected
    assert cached_bytes(config, 1000) == 1000 * expected


def test_the_room_of_a_growing_cache_is_at_most_twice_what_it_holds_beyond_the_first():
    store = GrowingKeys(mixer_of(), torch.float32, CPU)
    token = torch.randn(1, 2, 4)
    for length in range(1, 300):
        store.extend(token, token)
        room = [len(t) for t in vars(store).values() if isinstance(t, Tensor)]
        assert all(length <= size <= max(64, 2 * length) for size in room)


def test_a_growing_cache_keeps_what_it_had_when_it_grows():
    store = GrowingKeys(mixer_of(), torch.float32, CPU)
    k, v = torch.randn(500, 2, 4), torch.randn(500, 2, 4)
    at = 0
    for size in (1, 62, 1, 1, 70, 1, 300, 64):
        keys, values, _ = store.extend(k[at : at + size], v[at : at + size])
        at += size
        assert torch.equal(keys, k[:at])
        assert torch.equal(values, v[:at])


# ---- topic 30: Mistral 7B


def test_topic_30_a_window_in_every_layer_spans_131072_tokens():
    config = config_of("mistral-7b")
    windows = [layer.mixer.window for layer in config.layers]
    assert windows == [4096] * 32
    assert sum(windows) == 131_072


@pytest.mark.parametrize(("num_layers", "window"), [(1, 4), (3, 4), (2, 7)])
def test_topic_30_a_token_reaches_the_last_through_a_window_a_layer_and_no_further(
    num_layers, window
):
    """Each layer carries what it knows window - 1 tokens on: the span above, but for the token itself."""
    model, length = tiny(num_layers, window=window), 30
    ids = torch.arange(length) % 11
    reach = num_layers * (window - 1)

    def last(changed=None):
        other = ids.clone()
        if changed is not None:
            other[changed] += 11
        return model.logits(other)[-1]

    before = last()
    assert not torch.equal(last(length - 1 - reach), before)
    assert torch.equal(last(length - 2 - reach), before)


def test_topic_30_a_rolling_cache_of_32k_tokens_takes_512_mib_instead_of_4_gib():
    rolling = SequenceCache(config_of("mistral-7b"), torch.float16, META)
    assert held_bytes(rolling) == GIB // 2
    feed(rolling, config_of("mistral-7b"), 32_768)
    assert held_bytes(rolling) == GIB // 2
    whole = SequenceCache(config_of("mistral-7b", sliding_window=None), torch.float16, META)
    feed(whole, config_of("mistral-7b"), 32_768)
    assert held_bytes(whole) == 4 * GIB


def feed(cache, config, num_tokens):
    """Puts tokens into every layer in pieces of 4096, as a chunked prefill does."""
    mixer = config.layers[0].mixer
    piece = torch.empty(4096, mixer.num_kv_heads, mixer.head_dim, dtype=torch.float16, device=META)
    for store in cache.keys:
        for _ in range(num_tokens // 4096):
            store.extend(piece, piece)


PIECES = {
    "a token at a time": [1] * 23,
    "prefill shorter than the window": [3, *[1] * 20],
    "prefill of the window": [5, *[1] * 18],
    "prefill longer than the window": [13, *[1] * 10],
    "pieces": [2, 7, 1, 5, 8],
    "all at once": [23],
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_topic_30_slot_i_mod_w_holds_the_key_of_token_i_for_the_last_w(pieces):
    window, at = 5, 0
    store = RollingKeys(mixer_of(window=window), window, torch.float32, CPU)
    k, v = torch.randn(23, 2, 4), torch.randn(23, 2, 4)
    for size in pieces:
        keys, values, positions = store.extend(k[at : at + size], v[at : at + size])
        at += size
        assert torch.equal(keys, k[positions])
        assert torch.equal(values, v[positions])
        for token in range(max(0, at - window), at):
            assert torch.equal(store._keys[token % window], k[token])
            assert torch.equal(store._values[token % window], v[token])
        assert len(store._keys) == len(store._values) == window


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_topic_30_the_rolling_cache_equals_masked_full_attention(pieces):
    window, at, generator = 5, 0, torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(23, heads, 4, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    store = RollingKeys(mixer_of(window=window), window, torch.float64, CPU)
    out = []
    for size in pieces:
        now = slice(at, at + size)
        keys, values, positions = store.extend(k[now], v[now])
        rule = AttentionRule(scale=0.5, window=window)
        out.append(attend_segment(q[now], keys, values, rule, key_positions=positions))
        at += size
    torch.testing.assert_close(torch.cat(out), masked(q, k, v, 0.5, window))


def masked(q, k, v, scale, window):
    """Full attention [T, H, d] under the band 0 ≤ i - j < window, written out."""
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    hidden = (distance < 0) | (distance >= window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


# ---- what was never written, and what does not grow


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"window": 5, "num_sinks": 2}], ids=str)
def test_slots_that_were_never_written_are_never_read(options):
    """Uninitialised memory may hold anything: here it holds NaN."""
    model = tiny(2, **options)
    cache = SequenceCache(model.config, torch.float32, CPU)
    for store in cache.keys:
        store._keys.fill_(float("nan"))
        store._values.fill_(float("nan"))
    ids = torch.arange(90) % 11
    rows = []
    for start, stop in ((0, 2), *((i, i + 1) for i in range(2, 70)), (70, 90)):
        store = BatchCache([cache], [stop - start])
        context = AttentionContext.packed([stop - start], store=store, offsets=[start])
        rows.append(model.head(model(ids[start:stop], context)))
        store.commit()
    torch.testing.assert_close(torch.cat(rows), model.logits(ids), atol=2e-5, rtol=0)


def test_the_state_of_linear_attention_is_as_large_after_200_tokens_as_after_one():
    mixer = LinearAttentionConfig(num_heads=2, head_dim=8)
    model = build(mixer, 2)
    cache = SequenceCache(model.config, torch.float32, CPU)
    sizes = []
    for start, length in ((0, 1), (1, 150), (151, 49)):
        store = BatchCache([cache], [length])
        context = AttentionContext.packed([length], store=store, offsets=[start])
        model(torch.arange(length) % 11, context)
        store.commit()
        assert all(isinstance(state, LinearState) for state in cache.states)
        sizes.append(sum(s.outer.nbytes + s.total.nbytes for s in cache.states))
    assert cache.keys == [None, None]
    # 2 layers of 2 heads: 8 features by 8 values, and 8 totals, in fp32
    assert sizes == [2 * 2 * (8 * 8 + 8) * 4] * 3


def mixer_of(**options):
    return AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, **options)


def tiny(num_layers, **options):
    """A random model of softmax attention."""
    return build(mixer_of(**options), num_layers)


def build(mixer, num_layers):
    layer = LayerConfig(mixer=mixer, feed_forward=GLUConfig(intermediate_size=16))
    config = ModelConfig(
        family="llama",
        vocab_size=22,
        hidden_size=16,
        max_seq_len=256,
        layers=(layer,) * num_layers,
    )
    model = Decoder(config)
    model.reset_parameters(std=0.5, generator=torch.Generator().manual_seed(0))
    return model.requires_grad_(False).eval()
