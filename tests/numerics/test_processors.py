"""Logits processors against those of `transformers` on random logits."""

import random
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import logits_process as hf

from easyllm.engine import LLM, SamplingParams
from easyllm.engine.processors import (
    _allow_on_device,
    add_bias,
    allow_packed,
    bar,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    penalise_output,
    penalise_repetition,
    repeated_ngrams,
    scale,
)
from easyllm.engine.sampling import SamplerState, apply_sampling_filters, sample_tokens
from easyllm.models import save_model
from masks import packed
from tiny_models import build_tiny

EXACT = {"atol": 0, "rtol": 0}
ROWS, VOCAB = 12, 300
SPREADS = (0.1, 1.0, 6.0)
SETTINGS = {
    "temperature": (scale, hf.TemperatureLogitsWarper, (0.3, 1.7)),
    "top-k": (keep_top_k, hf.TopKLogitsWarper, (1, 5, 299, 1000)),
    "top-p": (keep_top_p, hf.TopPLogitsWarper, (0.01, 0.5, 0.9, 0.999)),
    "min-p": (keep_min_p, hf.MinPLogitsWarper, (0.01, 0.2, 1.0)),
    "typical": (keep_typical, hf.TypicalLogitsWarper, (0.05, 0.5, 0.95)),
}
CASES = [(name, value) for name, (*_, values) in SETTINGS.items() for value in values]


def random_logits(spread, seed=0, rows=ROWS):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, VOCAB, generator=generator) * spread
    logits[0, 7:19] = logits[0, 3]  # ties
    logits[1, 100:] = float("-inf")  # already masked out
    return logits


def random_ids(length, seed=0, rows=ROWS):
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_warper_equals_transformers(name, value, spread):
    ours, theirs, _ = SETTINGS[name]
    logits = random_logits(spread)
    expected = theirs(value)(random_ids(3), logits.clone())
    assert_close(ours(logits, value), expected, **EXACT)
    each = torch.full((ROWS,), value, dtype=torch.int64 if name == "top-k" else torch.float64)
    assert_close(ours(logits, each), expected, **EXACT)


@pytest.mark.parametrize(("spread", "quick"), [(0.1, False), (3.0, False), (10.0, True)])
@pytest.mark.parametrize("p", [0.3, 0.8, 0.9])
def test_top_p_of_a_large_vocabulary_equals_transformers(p, spread, quick, monkeypatch):
    """Uses the most likely tokens if they reach p, and otherwise sorts all tokens."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 20_000, generator=generator, dtype=torch.float64) * spread
    expected = hf.TopPLogitsWarper(p)(random_ids(3), logits.clone())
    if quick:
        monkeypatch.setattr(torch.Tensor, "sort", lambda *a, **k: pytest.fail("sorted"))
    assert_close(keep_top_p(logits, p), expected, **EXACT)
    assert_close(keep_top_p(logits, torch.full((8,), p)), expected, **EXACT)


@pytest.mark.parametrize("p", [1e-50, 1e-9, 1e-4])
def test_a_tiny_top_p_keeps_the_most_likely_token_in_any_vocabulary(p, monkeypatch):
    """1e-50 is 0 in fp32, which even an empty set of tokens would reach."""
    logits = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(1)) * 3
    quick = keep_top_p(logits, torch.full((4,), p, dtype=torch.float64))
    assert (quick > float("-inf")).sum(-1).tolist() == [1] * 4
    assert_close(quick.argmax(-1), logits.argmax(-1))
    monkeypatch.setattr("easyllm.engine.processors.FULL_SORT_MAX_VOCAB", 20_000)
    assert_close(keep_top_p(logits, torch.full((4,), p, dtype=torch.float64)), quick, **EXACT)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_the_repetition_penalty_covers_prompt_and_output_as_in_transformers(penalty, spread):
    logits, ids = random_logits(spread), random_ids(20)
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    for row in range(ROWS):
        for output_start in (0, 20, 7):  # the start of the output makes no difference
            params = SamplingParams(repetition_penalty=penalty)
            sampler = SamplerState(params, random.Random(0), ids[row].tolist(), output_start)
            assert_close(sampler.process(logits[row]), expected[row], **EXACT)
        assert_close(penalise_repetition(logits[row], ids[row], penalty), expected[row], **EXACT)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_forbidden_ngrams_equal_transformers(size):
    logits = random_logits(1.0)
    for length in (1, 2, 4, 40):
        ids = random_ids(length) % 4
        expected = hf.NoRepeatNGramLogitsProcessor(size)(ids, logits.clone())
        for row in range(ROWS):
            barred = bar(logits[row], repeated_ngrams(ids[row].tolist(), size))
            assert_close(barred, expected[row], **EXACT)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bitmasks_are_applied_alike_on_a_cpu_and_on_a_device(vocab_size, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, vocab_size, generator=generator, dtype=dtype)
    logits[0, 0], logits[1, 0] = float("inf"), float("-inf")
    size = (5, -(-vocab_size // 32))
    words = torch.randint(-(2**31), 2**31, size, generator=generator).to(torch.int32)
    bits = [[int(words[r, t // 32]) >> (t % 32) & 1 for t in range(vocab_size)] for r in range(5)]
    expected = logits.masked_fill(~torch.tensor(bits, dtype=torch.bool), float("-inf"))
    assert torch.equal(allow_packed(logits, words), expected)
    assert torch.equal(_allow_on_device(logits, words), expected)


def test_bias_min_tokens_and_allowed_ids_equal_transformers():
    logits, ids = random_logits(1.0), random_ids(9)
    bias = {3: 2.5, 17: -100.0, 4: 0.25}
    expected = hf.SequenceBiasLogitsProcessor([[[i], value] for i, value in bias.items()])(
        ids, logits.clone()
    )
    ends = hf.MinNewTokensLengthLogitsProcessor(5, 10, [2, 9])(ids, logits.clone())
    only = hf.PrefixConstrainedLogitsProcessor(lambda *_: [1, 2, 80], 1)(ids, logits.clone())
    words = packed([1, 2, 80], logits.shape[1]).expand(ROWS, -1)
    assert_close(allow_packed(logits, words), only, **EXACT)
    for row in range(ROWS):
        assert_close(add_bias(logits[row], bias), expected[row], **EXACT)
        sampler = SamplerState(
            SamplingParams(min_tokens=10), random.Random(0), ids[row].tolist(), 5, frozenset((2, 9))
        )
        assert_close(sampler.process(logits[row]), ends[row], **EXACT)
        sampler.params = SamplingParams(min_tokens=4)  # the output has four tokens
        assert_close(sampler.process(logits[row]), logits[row], **EXACT)


def test_presence_and_frequency_count_only_the_output_as_openai_defines_them():
    """mu[j] - c[j] · alpha_frequency - (c[j] > 0) · alpha_presence; c counts sampled tokens."""
    logits = random_logits(1.0)[0]
    ids, start = [5, 5, 8, 6, 8, 8], 2
    params = SamplingParams(presence_penalty=0.7, frequency_penalty=-0.3)
    sampler = SamplerState(params, random.Random(0), ids, start)
    expected = logits.clone()
    for token, count in {8: 3, 6: 1}.items():
        expected[token] = expected[token] - 0.7 - count * -0.3
    assert_close(sampler.process(logits), expected)
    sampler.push(6)
    expected[6] -= -0.3
    assert_close(sampler.process(logits), expected)
    counted = penalise_output(
        logits, torch.tensor([8, 6]), torch.tensor([3, 2]), presence=0.7, frequency=-0.3
    )
    assert_close(counted, expected)


def test_the_scope_of_the_penalties_differs():
    """A prompt token gets the repetition penalty, but no presence or frequency penalty."""
    logits = torch.ones(VOCAB)
    for changes, touched in (
        ({"repetition_penalty": 2.0}, True),
        ({"presence_penalty": 2.0}, False),
        ({"frequency_penalty": 2.0}, False),
    ):
        sampler = SamplerState(SamplingParams(**changes), random.Random(0), [4, 5], 2)
        assert (sampler.process(logits)[4] != 1) == touched


SETS = [
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9},
    {"temperature": 1.3, "top_p": 0.95, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"typical_p": 0.3, "repetition_penalty": 0.8},
    {"top_k": 3, "min_p": 0.5},
    {},
]


@pytest.mark.parametrize("settings", SETS, ids=str)
def test_all_processors_are_applied_in_the_order_of_generate(settings):
    """`generate` builds its processor list from a configuration; ours applies to one row."""
    logits, ids = random_logits(4.0), random_ids(15) % 9
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    config = GenerationConfig(do_sample=True, top_k=0, eos_token_id=2, **_without(settings))
    if "top_k" in settings:
        config.top_k = settings["top_k"]
    reference._prepare_special_tokens(config, device="cpu")
    processors = reference._get_logits_processor(config, input_ids_seq_length=15, device="cpu")
    expected = processors(ids, logits.clone())
    params = SamplingParams(**settings)
    rows = [
        SamplerState(params, random.Random(0), ids[row].tolist(), 10).process(logits[row])
        for row in range(ROWS)
    ]
    assert_close(apply_sampling_filters(torch.stack(rows), [params] * ROWS), expected, **EXACT)


def _without(settings):
    return {name: value for name, value in settings.items() if name != "top_k"}


def test_rows_of_a_mixed_batch_are_processed_as_each_alone():
    logits = random_logits(3.0)
    params = [SamplingParams(**SETS[row % len(SETS)]) for row in range(ROWS)]
    together = apply_sampling_filters(logits, params)
    for row in range(ROWS):
        assert_close(
            together[row], apply_sampling_filters(logits[row : row + 1], [params[row]])[0], **EXACT
        )


def test_samples_follow_the_probabilities_and_repeat_with_their_seed():
    """10,000 draws in batches of up to ten rows; tolerance of five standard errors."""
    logits = torch.tensor([[2.0, 1.0, 0.0, float("-inf"), -1.0]])
    expected = logits[0].softmax(-1)
    samplers = [SamplerState(SamplingParams(), random.Random(7), [0], 1)]
    drawn = [sample_tokens(logits, samplers)[0].token_id for _ in range(10_000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=5) / len(drawn)
    assert (shares - expected).abs().max() < 5 * 0.005
    assert shares[3] == 0
    for company in range(1, 10):
        samplers = [
            SamplerState(SamplingParams(), random.Random(7 + i), [0], 1) for i in range(company)
        ]
        again = [sample_tokens(logits.expand(company, -1), samplers)[0].token_id for _ in range(50)]
        assert again == drawn[:50]


def test_a_nan_row_and_a_fully_masked_row_do_not_affect_others():
    logits = random_logits(1.0, rows=4)
    logits[2] = float("nan")
    mask = type("Nothing", (), {"allowed": lambda self, output: []})()
    samplers = [SamplerState(SamplingParams(), random.Random(i), [0], 1) for i in range(4)]
    samplers[3].mask = mask
    alone = sample_tokens(logits[:1], [SamplerState(SamplingParams(), random.Random(0), [0], 1)])
    choices = sample_tokens(logits, samplers)
    assert choices[0].token_id == alone[0].token_id
    assert choices[3].token_id is None
    assert 0 <= choices[2].token_id < VOCAB


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny model in fp64, here and in `transformers`."""
    model = build_tiny(seed=5).double()
    folder = save_model(model, tmp_path_factory.mktemp("pair") / "m")
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return model, reference


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_tokens": 20, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_greedy_output_equals_generate(pair, tiny_tokenizer, settings):
    model, reference = pair
    llm = LLM(model=model, tokenizer=tiny_tokenizer)
    prompts = random_ids(9, seed=3, rows=4) + 3
    options = dict(settings)
    if "min_tokens" in options:
        options["min_new_tokens"] = options.pop("min_tokens")
    with torch.no_grad():
        theirs = reference.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    ours = llm.generate(prompts.tolist(), SamplingParams(temperature=0, max_tokens=24, **settings))
    for row, completion in zip(theirs[:, 9:].tolist(), ours, strict=True):
        row = row[: row.index(2) + 1] if 2 in row else row
        assert completion.token_ids == row
    if "no_repeat_ngram_size" in settings:
        text = prompts[0].tolist() + ours[0].token_ids
        pairs = list(pairwise(text))[8:]
        assert len(set(pairs)) == len(pairs)
