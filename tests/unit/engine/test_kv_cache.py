"""Contents and size of the KV cache, measured on real caches (large ones on the `meta` device)."""

import random

import pytest
import torch

from easyllm.engine import EngineConfig
from easyllm.engine.kv_cache import KVCache
from easyllm.engine.memory_plan import plan_memory
from easyllm.engine.page_table import PageTable
from easyllm.engine.pages import Namespace, PagePool
from easyllm.engine.runner import DecoderRunner
from easyllm.engine.scheduler import Scheduler, Sequence
from easyllm.engine.step import ScheduledChunk, Step
from easyllm.models.families import FAMILIES, family_of
from easyllm.nn.config import (
    AttentionConfig,
    GLUConfig,
    LayerConfig,
    LinearAttentionConfig,
    MLPConfig,
    ModelConfig,
)
from easyllm.nn.decoder import Decoder
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.linear_attention import LinearState
from easyllm.ops.paged_attention import paged_attention
from easyllm.plan.kv_cache import Rolling, cache_size, rolling_window

SIZES = {name: size for family in FAMILIES.values() for name, size in family.sizes.items()}
META = torch.device("meta")
CPU = torch.device("cpu")
GIB = 2**30


def config_of(name, **changes):
    size = SIZES[name] | changes
    return family_of(size["model_type"]).read_config(size)


def page_bytes(config, page_size=16, dtype=torch.float16):
    """Returns the bytes of one page in all layers of a real cache without allocated memory."""
    return KVCache(config, 1, page_size, dtype, META).num_bytes


# ---- MQA and GQA

PER_TOKEN = {
    "llama2-70b, 64 heads": ("llama2-70b", 64, 2_621_440),
    "llama2-70b as it is, 8": ("llama2-70b", None, 327_680),
    "llama2-70b, 1 head": ("llama2-70b", 1, 40_960),
    "smollm2, 9 heads": ("smollm2-135m", 9, 69_120),
    "smollm2 as it is, 3": ("smollm2-135m", None, 23_040),
}


@pytest.mark.parametrize(("name", "kv_heads", "expected"), PER_TOKEN.values(), ids=PER_TOKEN)
def test_bytes_per_token_in_fp16_have_their_published_values(name, kv_heads, expected):
    config = config_of(name, **{"num_key_value_heads": kv_heads} if kv_heads else {})
    assert page_bytes(config, 1) == expected
    assert page_bytes(config, 16) == 16 * expected
    assert cache_size(config, context=1000).total == 1000 * expected


# ---- OPT-13B in pages

OPT_13B = ModelConfig(
    family="easyllm",
    vocab_size=50272,
    hidden_size=5120,
    max_seq_len=2048,
    layers=(
        LayerConfig(
            mixer=AttentionConfig(num_heads=40, num_kv_heads=40, head_dim=128),
            feed_forward=MLPConfig(intermediate_size=20480),
        ),
    )
    * 40,
)


def test_a_token_of_opt_13b_takes_819200_bytes_and_a_page_of_16_takes_13107200():
    assert page_bytes(OPT_13B, 1) == 819_200
    assert page_bytes(OPT_13B, 16) == 13_107_200
    plan = plan_memory(
        OPT_13B, EngineConfig(), weight_bytes=26 * 10**9, itemsize=2, free_bytes=48 * 10**9
    )
    assert plan.page_bytes == 13_107_200
    assert plan.num_pages == int(0.25 * 48e9) // 13_107_200


def test_a_sequence_wastes_at_most_15_slots_unlike_contiguous_allocation():
    """Only the last page of a sequence has free slots.

    Space reserved for the longest sequence, as in systems before paged attention, would be used to
    a third or less here (the paper measured 20.4 to 38.2%).
    """
    rng = random.Random(0)
    pool = PagePool(2048, 16)
    scheduler = Scheduler(pool, max_running=32, max_step_tokens=256)
    lengths = {i: (rng.randrange(1, 400), rng.randrange(1, 300)) for i in range(64)}
    for number, (prompt, _) in lengths.items():
        tokens = [number, *(rng.randrange(5) for _ in range(prompt - 1))]
        scheduler.add(Sequence(id=number, tokens=tokens, prompt_length=prompt))
    used = reserved = 0
    while (step := scheduler.plan()) is not None:
        by_id = {sequence.id: sequence for sequence in scheduler.running}
        for piece in step.pieces:
            sequence = by_id[piece.sequence_id]
            computed = piece.start + len(piece.token_ids)
            assert 0 <= len(sequence.table.pages) * 16 - computed <= 15
            used, reserved = used + computed, reserved + 2048
            if computed == len(sequence.tokens):
                sequence.tokens.append(7)
            scheduler.advance(sequence, computed)
            if len(sequence.tokens) - sequence.prompt_length == lengths[sequence.id][1]:
                scheduler.remove(sequence)
    assert pool.available == pool.num_pages
    assert used / reserved < 0.382


# ---- Mistral 7B


def test_a_window_in_every_layer_spans_131072_tokens():
    config = config_of("mistral-7b")
    windows = [layer.mixer.window for layer in config.layers]
    assert windows == [4096] * 32
    assert sum(windows) == 131_072


@pytest.mark.parametrize(("num_layers", "window"), [(1, 4), (3, 4), (2, 7)])
def test_windows_in_every_layer_limit_the_receptive_field(num_layers, window):
    """Each layer extends the receptive field by window - 1 tokens."""
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


def bytes_after(config, num_tokens):
    """Returns the bytes cached for one sequence of `num_tokens`, prefilled in chunks of 4096."""
    pool = PagePool(num_tokens // 16, 16)
    rolling = rolling_window(config)
    scheduler = Scheduler(
        pool,
        max_step_tokens=4096,
        window=rolling.window if rolling else None,
        num_sinks=rolling.num_sinks if rolling else 0,
    )
    scheduler.add(Sequence(id=0, tokens=[1] * num_tokens, prompt_length=num_tokens))
    most = 0
    while scheduler.waiting or scheduler.running[0].pending:
        step = scheduler.plan()
        most = max(most, pool.num_pages - pool.available)
        (piece,) = step.pieces
        scheduler.advance(scheduler.running[0], piece.start + len(piece.token_ids))
    assert most <= scheduler.pages_needed(num_tokens)
    return len(scheduler.running[0].table.held) * page_bytes(config)


def test_a_rolling_cache_of_32k_tokens_takes_512_mib_instead_of_4_gib():
    rolling = config_of("mistral-7b")
    assert bytes_after(rolling, 32_768) == GIB // 2
    assert cache_size(rolling, context=32_768).total == GIB // 2
    whole = config_of("mistral-7b", sliding_window=None)
    assert bytes_after(whole, 32_768) == 4 * GIB
    assert cache_size(whole, context=32_768).total == 4 * GIB


def test_a_model_with_one_full_attention_layer_caches_all_tokens():
    config = config_of("mistral-7b")
    first = config.layers[0]
    seeing = first.model_copy(update={"mixer": first.mixer.model_copy(update={"window": None})})
    mixed = config.changed(layers=(seeing, *config.layers[1:]))
    assert rolling_window(config) == Rolling(window=4096, num_sinks=0)
    assert rolling_window(mixed) is None
    assert cache_size(mixed, context=32_768).total == 4 * GIB


PIECES = {
    "a token at a time": [1] * 23,
    "prefill shorter than the window": [3, *[1] * 20],
    "prefill of the window": [5, *[1] * 18],
    "prefill longer than the window": [13, *[1] * 10],
    "pieces": [2, 7, 1, 5, 8],
    "all at once": [23],
}


@pytest.mark.parametrize("page_size", [1, 2, 16])
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_the_rolling_cache_equals_masked_full_attention(pieces, page_size):
    """Pages before the window are freed and reused, filled with NaN in between."""
    window, at, generator = 5, 0, torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(23, heads, 4, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    pool = PagePool(-(-(window - 1 + 23) // page_size) + 1, page_size, prefix_caching=False)
    table = PageTable(pool, Namespace())
    keys, values = (
        torch.full((pool.num_pages, 2, page_size, 4), torch.nan, dtype=torch.float64)
        for _ in range(2)
    )
    rule, out = AttentionRule(scale=0.5, window=window), []
    for size in pieces:
        assert table.reserve(at, at + size, {})
        for i in range(at, at + size):
            keys[table.pages[i // page_size], :, i % page_size] = k[i]
            values[table.pages[i // page_size], :, i % page_size] = v[i]
        pages = torch.tensor([table.pages], dtype=torch.int32)
        queries = q[at : at + size]
        at += size
        out.append(paged_attention(queries, keys, values, pages, (size,), (at,), rule))
        table.commit([], at)
        table.roll(max(0, at - window + 1))
        gone = [p for p in range(pool.num_pages) if p not in table.held]
        keys[gone], values[gone] = torch.nan, torch.nan
        assert len(table.held) <= -(-(window - 1) // page_size) + 1
    torch.testing.assert_close(torch.cat(out), masked(q, k, v, 0.5, window))


def masked(q, k, v, scale, window):
    """Explicit full attention [T, H, d] with the band 0 ≤ i - j < window."""
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    hidden = (distance < 0) | (distance >= window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


# ---- unwritten slots, and constant-size states


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"window": 5, "num_sinks": 2}], ids=str)
def test_slots_that_were_never_written_are_never_read(options):
    """Uninitialised memory may contain anything; here it contains NaN."""
    model = tiny(2, **options)
    cache = KVCache(model.config, 7, 16, torch.float32, CPU)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    runner = DecoderRunner(model, cache)
    ids = torch.arange(90) % 11
    rows = []
    for start, stop in ((0, 2), *((i, i + 1) for i in range(2, 70)), (70, 90)):
        piece = ScheduledChunk(
            sequence_id=0,
            token_ids=tuple(ids[start:stop].tolist()),
            start=start,
            pages=(4, 2, 6, 0, 1, 5),
            num_logit_rows=stop - start,
        )
        rows.append(runner.run(Step(pieces=(piece,))))
    torch.testing.assert_close(torch.cat(rows), model.logits(ids), atol=2e-5, rtol=0)


def test_the_state_of_linear_attention_is_as_large_after_200_tokens_as_after_one():
    mixer = LinearAttentionConfig(num_heads=2, head_dim=8)
    model = build(mixer, 2)
    cache = KVCache(model.config, 13, 16, torch.float32, CPU)
    runner, sizes = DecoderRunner(model, cache), []
    for start, length in ((0, 1), (1, 150), (151, 49)):
        ids = tuple((torch.arange(length) % 11).tolist())
        piece = ScheduledChunk(sequence_id=3, token_ids=ids, start=start, pages=tuple(range(13)))
        runner.run(Step(pieces=(piece,)))
        states = cache.states(3)
        assert all(isinstance(state, LinearState) for state in states)
        sizes.append(sum(s.outer.nbytes + s.total.nbytes for s in states))
    assert cache.keys == [None, None]
    # 2 layers of 2 heads: 8 features by 8 values, and 8 totals, in fp32
    assert sizes == [2 * 2 * (8 * 8 + 8) * 4] * 3
    assert cache_size(model.config, context=200).state_bytes == sizes[0]
    runner.run(Step(pieces=(piece,), forks=((3, 4),), dropped=(3,)))
    assert cache.states(4)[0] is not None


def mixer_of(**options):
    return AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, **options)


def tiny(num_layers, **options):
    """Returns a random model with softmax attention."""
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


@pytest.mark.parametrize("num_sinks", [0, 4, 16, 20])
def test_sinks_remain_when_the_window_moves(num_sinks):
    pool = PagePool(40, 16)
    table = PageTable(pool, Namespace(), num_sinks=num_sinks)
    for length in range(1, 500):
        assert table.reserve(length - 1, length, {})
        table.roll(max(0, length - 64))
        stay = -(-num_sinks // 16)
        assert len(table.held) <= 64 // 16 + 1 + stay
        assert table.held[:stay] == table.pages[:stay]
        pool.check([table.held])
    table.release()
    assert pool.available == 40
