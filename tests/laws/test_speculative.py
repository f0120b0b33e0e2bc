"""Speculative decoding changes only the speed.

Greedy and n-gram output is equal token for token; sampled output is equal in distribution.
"""

import math
import random

import pytest
import torch
from tokenizers import Tokenizer as Backend

from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, Completion, Engine, EngineConfig, Request, SamplingParams
from easyllm.engine.draft_model import ModelDrafter
from easyllm.engine.sampling import Draft, SamplerState, sample_multinomial, sample_tokens
from easyllm.engine.speculative import NgramDrafter
from easyllm.models import save_model
from easyllm.nn.config import LinearAttentionConfig
from masks import RuleMask
from tiny_models import build_tiny


@pytest.fixture(scope="module")
def model():
    """In fp64: in fp32 the rounding of a row depends on the number of rows."""
    return build_tiny(seed=3).double()


@pytest.fixture(scope="module")
def likeness(model):
    """A draft that is often right and often wrong: the model with noise on its weights."""
    draft = build_tiny(seed=3).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in draft.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return draft


def results(engine, requests):
    done = {request.id: Completion() for request in requests}
    for event in engine.run(requests):
        done[event.request_id].take(event)
    return [[c.token_ids for c in (done[r.id], *done[r.id].others)] for r in requests]


def requests_of(**changes):
    generator = torch.Generator().manual_seed(2)
    params = {"temperature": 0, "max_tokens": 24} | changes
    prompts = [torch.randint(3, 320, (n,), generator=generator).tolist() for n in (4, 30, 17, 9)]
    prompts.append([7, 8, 9, 10] * 6)
    return [Request(prompt_ids=tuple(p), params=SamplingParams(**params)) for p in prompts]


def counted(engine):
    """Counts the passes and tokens of an engine's run."""
    runner, count = engine.runner, {"passes": 0}

    class Counting:
        def run(self, step):
            count["passes"] += 1
            return runner.run(step)

    engine._runner = Counting()
    return count


DRAFTERS = {
    "n-grams": lambda draft: NgramDrafter(5),
    "the model itself": lambda draft: ModelDrafter(build_tiny(seed=3).double(), num_pages=64),
    "a noisy copy": lambda draft: ModelDrafter(draft, 3, num_pages=64, page_size=4),
    "an unrelated model": lambda draft: ModelDrafter(build_tiny(seed=9).double(), num_pages=64),
    "a noisy copy with too few pages": lambda draft: ModelDrafter(
        draft, 3, num_pages=4, page_size=8
    ),
}
CHANGES = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "min_tokens": 20},
    "no bigram twice": {"no_repeat_ngram_size": 2},
    "stop strings": {"stop": ("e", "a", "t")},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
def test_speculative_greedy_equals_greedy(model, likeness, tiny_tokenizer, drafter, changes):
    requests = requests_of(**changes)
    plain = results(Engine(model, tiny_tokenizer), requests)
    tight = EngineConfig(page_size=4, num_pages=40, max_running=4, max_step_tokens=24)
    for options in (EngineConfig(), tight):
        engine = Engine(model, tiny_tokenizer, options, drafter=drafter(likeness))
        assert results(engine, requests) == plain
        engine.scheduler.check()
        assert engine.pool.available == engine.pool.num_pages
        if isinstance(engine.drafter, ModelDrafter):
            assert engine.drafter.pool.available == engine.drafter.pool.num_pages


def test_a_perfect_draft_saves_four_passes_of_five(model, tiny_tokenizer):
    request = requests_of(ignore_eos=True)[:1]
    plain, drafted = (
        Engine(model, tiny_tokenizer, drafter=drafter)
        for drafter in (None, ModelDrafter(model, 4, num_pages=64))
    )
    counts = [counted(engine) for engine in (plain, drafted)]
    assert results(plain, request) == results(drafted, request)
    assert counts[0]["passes"] == 24
    assert counts[1]["passes"] == 1 + math.ceil(23 / 5)


def test_ngram_drafts_save_passes_on_repetitive_text(model, tiny_tokenizer):
    """A mask makes the model repeat a phrase, as if it copied from its prompt."""

    request = [
        Request(
            prompt_ids=(5, 6),
            params=SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
            mask=RuleMask(lambda output: [10 + len(output) % 5]),
        )
    ]
    engine = Engine(model, tiny_tokenizer, drafter=NgramDrafter(4))
    count = counted(engine)
    assert results(engine, request) == [[[10 + i % 5 for i in range(40)]]]
    assert count["passes"] <= 15


def test_ngram_drafts_leave_even_sampled_tokens_unchanged(model, tiny_tokenizer):
    requests = requests_of(temperature=0.7, top_k=4, seed=6, n=2, ignore_eos=True)
    plain = results(Engine(model, tiny_tokenizer), requests)
    engine = Engine(model, tiny_tokenizer, drafter=NgramDrafter(3))
    assert results(engine, requests) == plain


def test_lookup_finds_the_latest_occurrence_of_the_longest_suffix():
    drafter = NgramDrafter(3, longest=2)
    assert drafter.lookup([1, 2, 3, 1, 2, 4, 5, 1, 2]) == [4, 5, 1]
    assert drafter.lookup([9, 2, 3, 1, 2]) == [3, 1, 2]  # no suffix of two tokens matches
    assert drafter.lookup([1, 2, 3]) == []
    assert drafter.lookup([1]) == []
    assert drafter.lookup([4, 4]) == [4]


def test_a_sampled_draft_is_accepted_with_p_over_q_and_else_replaced_from_the_residual():
    """Compares 20,000 draws with p, for any q: chi-squared below its 99.9% bound."""
    p = torch.tensor([[1.0, 0.5, -1.0, 2.0, 0.0]])
    expected = p[0].softmax(-1)
    for q in (
        torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2]),
        torch.tensor([0.9, 0.05, 0.05, 0.0, 0.0]),
        expected,
    ):
        source, counts = random.Random(3), torch.zeros(5)
        samplers = [SamplerState(SamplingParams(), source, [0], 1)] * 1000
        for _ in range(20):
            guesses = source.choices(range(5), q.tolist(), k=1000)
            drafts = [Draft(token_id=guess, probabilities=q) for guess in guesses]
            for choice in sample_tokens(p.expand(1000, -1), samplers, drafts):
                counts[choice.token_id] += 1
        chi2 = ((counts - 20_000 * expected) ** 2 / (20_000 * expected)).sum()
        assert chi2 < 18.47  # 4 degrees of freedom


def narrow_vocab(seed):
    """Returns a model of 12 tokens, so that complete continuations can be counted."""
    model = build_tiny(seed=seed, vocab_size=12, max_position_embeddings=64, eos_token_id=11)
    return model.double()


def surprise(tokenizer, count=4_000):
    """Returns chi-squared of sampled three-token continuations, and its 99.9% bound.

    The draft agrees with the model about half the time. The statistic compares the joint counts of
    the second and third tokens, which are verified draft tokens, with the exact distribution.
    """
    target, draft = narrow_vocab(3), narrow_vocab(4)
    prompt = (5, 7, 1)
    exact = torch.zeros(12, 12, dtype=torch.float64)
    first = (target.logits(list(prompt))[-1] / 1.5).softmax(-1)
    for a in range(12):
        second = (target.logits([*prompt, a])[-1] / 1.5).softmax(-1)
        for b in range(12):
            third = (target.logits([*prompt, a, b])[-1] / 1.5).softmax(-1)
            exact[b] += first[a] * second[b] * third
    drafter = ModelDrafter(draft, 2, num_pages=2000, page_size=4)
    options = EngineConfig(page_size=4, num_pages=4000, max_running=256, max_step_tokens=1024)
    engine = Engine(target, tokenizer, options, drafter=drafter)
    counts = torch.zeros(12, 12, dtype=torch.float64)
    for batch in range(count // 125):
        params = SamplingParams(temperature=1.5, max_tokens=3, ignore_eos=True, n=125, seed=batch)
        ((*several,),) = results(engine, [Request(prompt_ids=prompt, params=params)])
        for _, b, c in several:
            counts[b, c] += 1
    assert counts.sum() == count
    likely = exact > 20 / count
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    expected = count * torch.cat([exact[likely], exact[~likely].sum()[None]])
    chi2 = float(((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum())
    freedom = len(observed) - 1
    return chi2, freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


def test_tokens_sampled_with_a_draft_model_have_the_models_distribution(tiny_tokenizer):
    chi2, bound = surprise(tiny_tokenizer)
    assert chi2 < bound


def test_draft_tokens_that_are_always_accepted_change_the_distribution(tiny_tokenizer, monkeypatch):
    """Negative control."""

    def believing(logits, sources, drafts=None):
        ids = sample_multinomial(logits, sources)
        for row, draft in enumerate(drafts or ()):
            if draft is not None:
                ids[row] = draft.token_id
        return ids

    monkeypatch.setattr("easyllm.engine.sampling.sample_multinomial", believing)
    chi2, bound = surprise(tiny_tokenizer, 1_000)
    assert chi2 > 2 * bound


def test_drafts_that_cannot_work_are_refused_in_one_sentence(
    model, tiny_tokenizer, tmp_path, tiny_folder
):
    other = build_tiny(vocab_size=400).double()
    with pytest.raises(ConfigError, match="draft model has 400 token ids and the model 320; use"):
        LLM(model=model, tokenizer=tiny_tokenizer, draft=other)
    linear = LinearAttentionConfig(num_heads=2, head_dim=16)
    layers = tuple(x.model_copy(update={"mixer": linear}) for x in model.config.layers)
    recurrent = type(model)(model.config.changed(layers=layers))
    recurrent.reset_parameters()
    for draft, target in ((recurrent, model), (model, recurrent), ("ngram", recurrent)):
        with pytest.raises(ConfigError, match="a layer of linear attention cannot do; leave out"):
            LLM(model=target, tokenizer=tiny_tokenizer, draft=draft)
    turning = build_tiny(rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    for draft in ("ngram", model):
        with pytest.raises(ConfigError, match="LongRoPE rotate keys by the length of a pass"):
            LLM(model=turning, tokenizer=tiny_tokenizer, draft=draft)
    LLM(model=model, tokenizer=tiny_tokenizer, draft=turning)  # a draft model may use dynamic NTK
    with pytest.raises(
        ConfigError, match="draft_tokens=0: input should be greater than or equal to 1"
    ):
        LLM(model=model, tokenizer=tiny_tokenizer, draft="ngram", draft_tokens=0)
    strange = _with_another_word(tiny_tokenizer)
    folder = save_model(build_tiny(), tmp_path / "draft", tokenizer=strange)
    with pytest.raises(ConfigError, match="has another vocabulary"):
        LLM(model=model, tokenizer=tiny_tokenizer, draft=folder)
    LLM(model=model, tokenizer=tiny_tokenizer, draft=tiny_folder)


def _with_another_word(tokenizer):
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.add_tokens(["another"])
    return type(tokenizer)(backend, tokenizer.special)
