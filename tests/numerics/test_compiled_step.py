"""The compiled step against the decoder: accuracy, quantized weights, pages, batch invariance."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from easyllm.adapters import VeRAConfig, attach
from easyllm.core import device
from easyllm.core.errors import ConfigError
from easyllm.engine import compiled_step
from easyllm.engine.compiled_step import CompiledStep
from easyllm.nn import AttentionConfig, Decoder, GLUConfig, LayerConfig, ModelConfig
from easyllm.nn.config import LayerNormConfig, MLPConfig, RMSNormConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.position_config import (
    Alibi,
    DynamicNTKScaling,
    LinearScaling,
    NoPosition,
    Rope,
    YarnScaling,
)
from easyllm.ops import huge_memory
from easyllm.ops.kernels import build
from easyllm.ops.paged_attention import QuantizedPages, new_pages, paged_attention, write_pages
from easyllm.quant import quantize_weights
from tiny_models import build_tiny

pytestmark = pytest.mark.usefixtures("two_threads")  # kernels split their work

PAGE_SIZE = 8


@pytest.fixture(autouse=True)
def _kernels():
    if build._library() is None:
        pytest.skip("no C compiler on this machine")


def model_of(
    *,
    hidden=48,
    inner=80,
    norm=None,
    dtype=torch.float32,
    num_layers=2,
    feed_forward=None,
    **attention,
):
    """Returns a random model, by default Llama-like."""
    plain = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    outer = {
        key: attention.pop(key)
        for key in ("tie_embeddings", "embedding_scale", "logit_softcap")
        if key in attention
    }
    layer = LayerConfig(
        mixer=AttentionConfig(**(plain | attention)),
        feed_forward=feed_forward or GLUConfig(intermediate_size=inner),
    )
    config = ModelConfig(
        family="easyllm",
        vocab_size=203,
        hidden_size=hidden,
        max_seq_len=512,
        layers=(layer,) * num_layers,
        norm=norm or RMSNormConfig(),
        **outer,
    )
    model = Decoder(config)
    generator = torch.Generator().manual_seed(3)
    model.reset_parameters(std=0.25, generator=generator)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return model.requires_grad_(False).eval().to(dtype)


class Cache:
    """NaN-filled pages of all layers with shuffled block tables, and a store for the decoder."""

    def __init__(self, model, num_sequences, *, dtype=torch.float32, pages_each=20):
        mixer = model.config.layers[0].mixer
        total = num_sequences * pages_each + 2
        shape = (total, mixer.num_kv_heads, PAGE_SIZE, mixer.head_dim)
        self.keys, self.values = (
            [self._poisoned(shape, dtype) for _ in model.layers] for _ in range(2)
        )
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        self.table = order[: num_sequences * pages_each].view(num_sequences, -1).int()
        self.seen = [0] * num_sequences

    @staticmethod
    def _poisoned(shape, dtype):
        pages = new_pages(shape, dtype)
        if isinstance(pages, QuantizedPages):
            pages.scales.fill_(float("nan"))
            pages.codes.fill_(99)
        else:
            pages.fill_(float("nan"))
        return pages

    def attend(self, layer, q, k, v, rule, prefix_lengths=None):
        for pages, x in ((self.keys[layer], k), (self.values[layer], v)):
            write_pages(pages, x, self._page_ids, self._slots)
        return paged_attention(
            q,
            self.keys[layer],
            self.values[layer],
            self._table,
            self._lengths,
            self._key_lengths,
            rule,
        )

    def forward(self, model, pieces):
        """Returns the decoder's logits for all tokens of `pieces`, {sequence: its new ids}."""
        self._lengths = tuple(len(ids) for ids in pieces.values())
        starts = [self.seen[n] for n in pieces]
        positions = [
            torch.arange(start, start + length)
            for start, length in zip(starts, self._lengths, strict=True)
        ]
        self._key_lengths = tuple(map(sum, zip(starts, self._lengths, strict=True)))
        self._table = self.table[list(pieces)].contiguous()
        self._page_ids = torch.cat(
            [row[p // PAGE_SIZE] for row, p in zip(self._table, positions, strict=True)]
        ).long()
        self._slots = torch.cat(positions) % PAGE_SIZE
        context = ForwardContext.packed(self._lengths, store=self, offsets=starts)
        hidden = model(torch.tensor([i for ids in pieces.values() for i in ids]), context)
        for n, end in zip(pieces, self._key_lengths, strict=True):
            self.seen[n] = end
        return model.head(hidden)

    def copy(self):
        return copy.deepcopy(self)


def ids_of(count, seed=0):
    return torch.randint(0, 203, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def step_of(model, cache):
    return CompiledStep(model, cache.keys, cache.values)


def run(step, cache, sequences, ids, positions=None):
    """Runs one token of each sequence through the compiled step."""
    lengths = [cache.seen[n] + 1 for n in sequences]
    return step.run(
        ids,
        [n - 1 for n in lengths] if positions is None else positions,
        cache.table[list(sequences)].contiguous(),
        lengths,
    )


MODELS = {
    "llama": {},
    "tied": {"tie_embeddings": True},
    "mha, odd widths": {"num_kv_heads": 4, "hidden": 37, "inner": 53, "head_dim": 24},
    "mqa, wide heads": {"num_kv_heads": 1, "head_dim": 64},
    "qkv bias": {"qkv_bias": True, "out_bias": True},
    "biased feed-forward": {"feed_forward": GLUConfig(intermediate_size=40, bias=True)},
    "qk norm": {"qk_norm": RMSNormConfig(eps=1e-4)},
    "offset norms": {"norm": RMSNormConfig(unit_offset=True), "embedding_scale": 6.0},
    "window": {"window": 11},
    "scale": {"scale": 0.7},
    "no positions": {"position": NoPosition()},
    "alibi": {"position": Alibi()},
    "alibi, window": {"position": Alibi(), "window": 11, "num_kv_heads": 1},
    "part of a head turns": {"position": Rope(rotary_dim=8)},
    "linear scaling": {"position": Rope(scaling=LinearScaling(factor=4.0))},
    "yarn": {"position": Rope(scaling=YarnScaling(factor=4.0, original_max_seq_len=64))},
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_fp32_is_as_close_to_fp64_as_the_decoder(changes):
    model = model_of(**changes)
    wide = copy.deepcopy(model).double()
    ids = ids_of(90)
    exact = wide.logits(ids)
    for length in (1, 8, 65, 89):
        cache = Cache(model, 1)
        cache.forward(model, {0: ids[:length]})
        other = cache.copy()
        ours = run(step_of(model, cache), cache, [0], [ids[length]])
        theirs = other.forward(model, {0: [ids[length]]})
        distance = (ours[0].double() - exact[length]).abs().max()
        own = (theirs[0].double() - exact[length]).abs().max()
        # allows a few last digits where PyTorch's own error is almost zero by chance
        assert distance <= 2 * own + 2e-6 * exact[length].abs().max()


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_weights_match_the_quantized_decoder(scheme, changes):
    """Compares a single layer, because a last digit may flip a rounding of activations to int8."""
    model = quantize_weights(model_of(num_layers=1, **changes), scheme)
    cache = Cache(model, 1)
    cache.forward(model, {0: ids_of(30)})
    other = cache.copy()
    ours = run(step_of(model, cache), cache, [0], [7])
    theirs = other.forward(model, {0: [7]})
    assert (ours - theirs).abs().max() <= 0.01 * theirs.abs().max()
    assert (ours - theirs).square().mean().sqrt() <= 2e-3 * theirs.square().mean().sqrt()


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_bf16_weights_match_within_bf16_precision(scheme):
    model = model_of(dtype=torch.bfloat16)
    if scheme:
        quantize_weights(model, scheme)
    cache = Cache(model, 1, dtype=torch.bfloat16)
    cache.forward(model, {0: ids_of(30)})
    other = cache.copy()
    ours = run(step_of(model, cache), cache, [0], [7])
    theirs = other.forward(model, {0: [7]})
    assert (ours - theirs).abs().max() <= 0.05 * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "int8", "int4"])
def test_many_steps_fill_the_pages_like_the_decoder(dtype):
    """Compares the logits of twenty single-token steps, then the contents of the pages."""
    model = model_of()
    ours, theirs = Cache(model, 2, dtype=dtype), Cache(model, 2, dtype=dtype)
    for cache in (ours, theirs):
        cache.forward(model, {0: ids_of(5), 1: ids_of(13)})
    step = step_of(model, ours)
    # a key halfway between two codes may be rounded to either
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, "int8": 2e-2, "int4": 0.2}[dtype]
    for token in range(20):
        a = run(step, ours, [0, 1], [token, 2 * token])
        ours.seen = [n + 1 for n in ours.seen]
        b = theirs.forward(model, {0: [token], 1: [2 * token]})
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    for mine, other in zip(ours.keys + ours.values, theirs.keys + theirs.values, strict=True):
        if isinstance(mine, QuantizedPages):
            wrong = (mine.codes.int() - other.codes.int()).ne(0).float().mean()
            assert wrong <= 0.02
            mine, other = mine.scales, other.scales
        assert torch.equal(mine.isnan(), other.isnan())
        written = ~other.isnan()
        torch.testing.assert_close(mine[written], other[written], atol=0.05, rtol=0.02)


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_bitwise_batch_invariant(scheme, dtype):
    model = model_of()
    if scheme:
        quantize_weights(model, scheme)
    lengths = [3, 150, 64, 9, 31, 1]
    cache = Cache(model, 6, dtype=dtype)
    cache.forward(model, {n: ids_of(length, seed=n) for n, length in enumerate(lengths)})
    step = step_of(model, cache)
    together = run(step, cache, range(6), [1, 2, 3, 4, 5, 6])
    for n in range(6):
        assert torch.equal(run(step, cache, [n], [n + 1])[0], together[n])
    assert torch.equal(run(step, cache, [5, 1], [6, 2]), together[[5, 1]])


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_rows_are_batch_invariant_in_large_batches(scheme):
    """More rows than an AMX tile, with widths that fill neither panels nor groups."""
    model = quantize_weights(model_of(**MODELS["mha, odd widths"]), scheme)
    cache = Cache(model, 37, pages_each=2)
    cache.forward(model, {n: ids_of(1 + n % 9, seed=n) for n in range(37)})
    step = step_of(model, cache)
    together = run(step, cache, range(37), range(1, 38))
    for n in range(37):
        assert torch.equal(run(step, cache, [n], [n + 1])[0], together[n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", ["mha, odd widths", "wide"])
def test_rows_are_batch_invariant_in_large_batches_with_dense_weights(model, dtype):
    """Partially filled registers and groups, several chunks of inputs and blocks of rows."""
    built = model_of(**MODELS.get(model, {"hidden": 520, "inner": 1100}), dtype=dtype)
    cache = Cache(built, 71, pages_each=2)
    cache.forward(built, {n: ids_of(1 + n % 9, seed=n) for n in range(71)})
    step = step_of(built, cache)
    together = run(step, cache, range(71), range(1, 72))
    for n in (0, 1, 35, 69, 70):
        assert torch.equal(run(step, cache, [n], [n + 1])[0], together[n])
    for some in (range(3), range(64, 71), range(5, 38)):
        assert torch.equal(run(step, cache, some, [n + 1 for n in some]), together[some])


@pytest.mark.parametrize(
    ("dtype", "features", "has_unit", "most"),
    [
        (torch.float32, {"avx2"}, False, 128),
        (torch.float32, {"avx512_bf16", "amx_bf16"}, True, 128),
        (torch.bfloat16, {"avx2"}, False, 128),
        (torch.bfloat16, {"avx512_bf16"}, False, 32),
        (torch.bfloat16, {"avx512_bf16", "amx_bf16"}, True, 2),
        (torch.bfloat16, {"avx512_bf16", "amx_bf16"}, False, 32),
        (torch.bfloat16, {"asimddp", "bf16"}, False, 2),
    ],
)
def test_the_row_limit_for_dense_weights_depends_on_dtype_and_cpu(
    monkeypatch, dtype, features, has_unit, most
):
    class Kernels:
        @staticmethod
        def tiles_ready():
            return int(has_unit)

    model = model_of(dtype=dtype)
    monkeypatch.setattr(device, "cpu_features", lambda: frozenset(features))
    monkeypatch.setattr(compiled_step, "cpu_features", lambda: frozenset(features))
    monkeypatch.setattr(compiled_step, "kernels_for", lambda *_: Kernels)
    assert compiled_step._most_rows(model) == most


def test_a_step_may_contain_several_tokens_of_one_sequence():
    """As required for verifying several draft tokens: each token sees the preceding ones."""
    model = model_of()
    cache = Cache(model, 1)
    cache.forward(model, {0: ids_of(20)})
    other, step = cache.copy(), step_of(model, cache)
    table = cache.table.expand(3, -1).contiguous()
    ours = step.run([4, 5, 6], [20, 21, 22], table, [21, 22, 23])
    theirs = other.forward(model, {0: [4, 5, 6]})
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_positions_may_differ_from_cache_slots():
    """Evicted tokens leave a gap in the positions (unless positions are those inside the cache)."""
    model = model_of()
    cache = Cache(model, 1)
    cache.forward(model, {0: ids_of(20)})
    step = step_of(model, cache)
    near, far = (run(step, cache, [0], [9], positions=[p]) for p in (20, 5000))
    assert far.isfinite().all()
    assert not torch.allclose(near, far)
    assert torch.equal(run(step, cache, [0], [9], positions=[20]), near)


def test_results_are_bitwise_independent_of_the_number_of_threads():
    model = quantize_weights(model_of(), "int4")
    cache = Cache(model, 3)
    cache.forward(model, {n: ids_of(70, seed=n) for n in range(3)})
    step = step_of(model, cache)
    wanted = run(step, cache, range(3), [1, 2, 3])
    for count in (1, 3):
        torch.set_num_threads(count)
        assert torch.equal(run(step, cache, range(3), [1, 2, 3]), wanted)


REFUSED = {
    "half-split RoPE": {"position": Rope(interleaved=True)},
    "fixed frequencies": {
        "position": Rope(scaling=DynamicNTKScaling(factor=2.0, original_max_seq_len=64))
    },
    "SiLU": {"feed_forward": MLPConfig(intermediate_size=64)},
    "GLU with": {"feed_forward": GLUConfig(intermediate_size=64, activation="gelu")},
    "RMS norms": {"norm": LayerNormConfig()},
    "soft cap": {"softcap": 30.0},
    "capped": {"logit_softcap": 30.0},
    "sinks": {"window": 8, "num_sinks": 2},
    "head_dim 10": {"head_dim": 10},
    "fp32 or bf16": {"dtype": torch.float64},
}


@pytest.mark.parametrize("word", REFUSED)
def test_unsupported_parts_are_named(word):
    model = model_of(**REFUSED[word])
    assert word in CompiledStep.unsupported_reason(model)
    with pytest.raises(ConfigError, match="does not support"):
        CompiledStep(model, [], [])


def test_adapters_and_missing_compilers_are_refused(monkeypatch):
    model = build_tiny()
    assert CompiledStep.unsupported_reason(model) is None
    attach(model, VeRAConfig(rank=4))
    assert "adapters" in CompiledStep.unsupported_reason(model)
    monkeypatch.setattr(build, "_library", lambda: None)
    assert "C compiler" in CompiledStep.unsupported_reason(build_tiny())


def test_the_logits_buffer_is_reused_once_released(monkeypatch):
    monkeypatch.setattr(huge_memory, "SMALL", 1)
    model = model_of()
    cache = Cache(model, 1)
    cache.forward(model, {0: ids_of(20)})
    step = step_of(model, cache)
    first = run(step, cache, [0], [5])
    place, kept = first.data_ptr(), first.clone()
    second = run(step, cache, [0], [6])
    assert second.data_ptr() != place
    assert torch.equal(first, kept)
    row = first[0]
    del first
    assert run(step, cache, [0], [6]).data_ptr() != place
    assert torch.equal(row, kept[0])
    del row
    assert place in {run(step, cache, [0], [6]).data_ptr() for _ in range(4)}


def test_out_of_bounds_accesses_are_refused():
    model = model_of()
    cache = Cache(model, 1)
    step = step_of(model, cache)
    table = cache.table
    assert step.run([], [], table[:0], []).shape == (0, 203)
    for arguments, word in [
        (([203], [0], table, [1]), "0 to 202"),
        (([-1], [0], table, [1]), "0 to 202"),
        (([1], [0], table, [161]), "table of 160 tokens"),
        (([1], [0], table, [0]), "table of 160 tokens"),
        (([1], [-1], table, [1]), "table of 160 tokens"),
        (([1], [0, 1], table, [1]), "as many positions"),
        (([1], [0], table.long(), [1]), "int32"),
    ]:
        with pytest.raises(ConfigError, match=word):
            step.run(*arguments)
    with pytest.raises(ConfigError, match="1 layers of pages"):
        CompiledStep(model, cache.keys[:1], cache.values[:1])


def test_a_step_follows_weights_that_are_moved_or_replaced(tiny_tokenizer):
    """Two engines on one model, and weights that are replaced without notice."""
    from easyllm.engine import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    model = build_tiny(seed=1)
    first, second = (LLM(model=model, tokenizer=tiny_tokenizer) for _ in range(2))
    prompt = [[5, 6, 7, 8]]
    before = first.generate(prompt, params)[0].token_ids
    assert second.generate(prompt, params)[0].token_ids == before
    assert first.generate(prompt, params)[0].token_ids == before
    other = build_tiny(seed=2)
    expected = LLM(model=other, tokenizer=tiny_tokenizer).generate(prompt, params)[0].token_ids
    for mine, theirs in zip(model.modules(), other.modules(), strict=True):
        for name, value in theirs.named_parameters(recurse=False):
            setattr(mine, name, torch.nn.Parameter(value.clone(), requires_grad=False))
    for llm in (first, second):
        llm.engine.clear_prefix_cache()
        assert llm.generate(prompt, params)[0].token_ids == expected


@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc"
)
def test_concatenated_weights_are_never_stored_twice():
    script = """
import ctypes
from torch import nn
from easyllm.engine.compiled_step import gather_weights
from easyllm.nn.linear import Linear

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

model = nn.ModuleList(Linear(1024, 1024) for _ in range(96))
for linear in model:
    linear.weight.data.fill_(1.0)
before = peak()
gather_weights(model)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 0.5 * 96 * 2**22
