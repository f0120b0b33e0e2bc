"""The engine: a request's output does not depend on what shares its batch, pages and prefix."""

import copy

import pytest
import torch

from easyllm.adapters import LoRAConfig
from easyllm.adapters.attach import place
from easyllm.engine import LLM, Engine, EngineConfig, Request, SamplingParams
from easyllm.nn.context import ForwardContext
from engine_requests import GREEDY, KINDS, ids_of, layered, mixed_requests, prompts_of, results
from tiny_models import build_tiny


@pytest.fixture(scope="module")
def model():
    """In fp64: in fp32 the rounding of a row depends on the number of rows."""
    return build_tiny(seed=3).double()


def test_a_batch_of_64_mixed_requests_equals_each_alone(model, tiny_tokenizer):
    requests = mixed_requests(64)
    engine = Engine(model, tiny_tokenizer, EngineConfig(max_running=80, max_step_tokens=256))
    together = results(engine, requests)
    assert engine.scheduler.num_preemptions == 0
    other = Engine(model, tiny_tokenizer)
    for request, got in zip(requests, together, strict=True):
        (alone,) = results(other, [request])
        assert ids_of([got]) == ids_of([alone])
        assert [c.text for c in got] == [c.text for c in alone]
        for a, b in zip(got, alone, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-9)


def test_preempted_requests_equal_uninterrupted_ones(model, tiny_tokenizer):
    """With so few pages that most requests are computed more than once."""
    requests = mixed_requests(24, longest=13, more=25)
    tight = EngineConfig(page_size=4, num_pages=28, max_running=12, max_step_tokens=64)
    engine = Engine(model, tiny_tokenizer, tight)
    crowded = results(engine, requests)
    assert engine.scheduler.num_preemptions >= 10
    assert engine.pool.available == engine.pool.num_pages
    assert ids_of(crowded) == ids_of(results(Engine(model, tiny_tokenizer), requests))


@pytest.mark.parametrize("budget", [1, 3, 7, 64])
def test_chunked_prefill_equals_unchunked_prefill(model, tiny_tokenizer, budget):
    (prompt,) = prompts_of([50], seed=4)
    request = Request(prompt_ids=prompt, params=SamplingParams(**GREEDY, prompt_logprobs=0))
    options = EngineConfig(max_running=1, max_step_tokens=budget)
    engine = Engine(model, tiny_tokenizer, options)
    (chunked,) = results(engine, [request])
    (whole,) = results(Engine(model, tiny_tokenizer), [request])
    assert ids_of([chunked]) == ids_of([whole])
    for got in (chunked, whole):
        raw = [entry.raw for entry in got[0].prompt_logprobs]
        expected = LLM(model=model, tokenizer=tiny_tokenizer).score(prompt)
        assert raw == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_other_mixers_work_with_batching_preemption_forks_and_prefix_caching(kind, tiny_tokenizer):
    model = layered(*KINDS[kind])
    base = prompts_of([30], seed=6)[0]
    params = SamplingParams(temperature=1.0, seed=4, n=2, max_tokens=14, ignore_eos=True)
    requests = [Request(prompt_ids=(*base[: 10 + 3 * i], 5, 7), params=params) for i in range(6)]
    tight = EngineConfig(page_size=4, num_pages=14, max_running=6, max_step_tokens=20)
    engine = Engine(model, tiny_tokenizer, tight)
    crowded = results(engine, requests)
    assert engine.scheduler.num_preemptions > 0
    assert engine.pool.available == 14
    wide = Engine(model, tiny_tokenizer)
    alone = [results(wide, [request])[0] for request in requests]
    assert ids_of(crowded) == ids_of(alone)
    for completion in alone[0]:
        ids = [*requests[0].prompt_ids, *completion.token_ids]
        logprobs = model.logits(ids).log_softmax(-1)
        start = len(requests[0].prompt_ids)
        expected = [logprobs[i - 1, ids[i]].item() for i in range(start, len(ids))]
        assert completion.logprobs == pytest.approx(expected, abs=1e-9)


def test_sliding_windows_in_every_layer_free_pages_as_they_move(tiny_tokenizer):
    model = layered(*KINDS["windows"])
    options = EngineConfig(page_size=4, num_pages=8, max_running=1, max_step_tokens=12)
    engine = Engine(model, tiny_tokenizer, options)
    (prompt,) = prompts_of([60])
    request = Request(prompt_ids=prompt, params=SamplingParams(temperature=0, max_tokens=90))
    engine.add(request)
    events, most = [], 0
    while engine.busy:
        events += engine.step()
        most = max(most, engine.pool.num_pages - engine.pool.available)
    assert most <= 6  # all tokens would need 38
    (wide,) = results(Engine(model, tiny_tokenizer), [request])
    assert [e.token_id for e in events] == wide[0].token_ids


def test_prefix_lm_prompts_are_not_chunked_in_small_steps_or_after_preemption(tiny_tokenizer):
    model = build_tiny(seed=4).double()
    model.config = model.config.changed(prompt_mask="prefix")
    tight = EngineConfig(page_size=4, num_pages=14, max_running=6, max_step_tokens=8)
    engine = Engine(model, tiny_tokenizer, tight)
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=14, n=2, ignore_eos=True)
    requests = [Request(prompt_ids=p, params=params) for p in prompts_of([20, 6, 15, 3])]
    got = results(engine, requests)
    assert engine.scheduler.num_preemptions > 0
    for request, completions in zip(requests, got, strict=True):
        start = len(request.prompt_ids)
        for completion in completions:
            ids = [*request.prompt_ids, *completion.token_ids]
            context = ForwardContext.packed([len(ids)], prefix_lengths=(start,))
            logprobs = model.head(model(torch.tensor(ids), context)).log_softmax(-1)
            expected = [logprobs[i - 1, ids[i]].item() for i in range(start, len(ids))]
            assert completion.logprobs == pytest.approx(expected, abs=1e-9)


def test_a_cached_prefix_gives_equal_output(model, tiny_tokenizer):
    base = prompts_of([70], seed=1)[0]
    engine = Engine(model, tiny_tokenizer)
    params = SamplingParams(**GREEDY, logprobs=3)
    for length, extra in ((70, ()), (70, (5, 6)), (50, (8,)), (70, ())):
        request = Request(prompt_ids=(*base[:length], *extra), params=params)
        engine.add(request)
        events = engine.step()
        computed = engine.scheduler.running[0].table.pages
        (fresh,) = results(
            Engine(model, tiny_tokenizer, EngineConfig(prefix_caching=False)), [request]
        )
        while engine.busy:
            events += engine.step()
        assert [e.token_id for e in events] == fresh[0].token_ids
        assert [e.logprob for e in events] == pytest.approx(fresh[0].logprobs, abs=1e-9)
        assert computed
    assert engine.pool.idle > 0


class Counting:
    """Counts the tokens that a runner computes."""

    def __init__(self, engine):
        self.runner, self.tokens = engine.runner, 0
        engine._runner = self

    def run(self, step):
        self.tokens += sum(len(piece.token_ids) for piece in step.pieces)
        return self.runner.run(step)


def tokens_computed(engine, request):
    counting = Counting(engine)
    list(engine.run([request]))
    engine._runner = counting.runner
    return counting.tokens


def test_a_cached_prefix_is_reused_unless_salt_adapter_or_prompt_logprobs_forbid_it(
    model, tiny_tokenizer
):
    (prompt,) = prompts_of([67])
    adapted = copy.deepcopy(model)
    for _, adapter in place(adapted, LoRAConfig(rank=2), name="lora").linears.values():
        adapter.reset_parameters()
    engine = Engine(adapted, tiny_tokenizer)
    one = SamplingParams(temperature=0, max_tokens=1)

    def request(params=one, **options):
        return Request(prompt_ids=prompt, params=params, **options)

    assert tokens_computed(engine, request()) == 67
    assert tokens_computed(engine, request()) == 3  # four pages of 16 are cached
    assert tokens_computed(engine, request(salt="tenant")) == 67
    assert tokens_computed(engine, request(adapter="lora")) == 67
    assert tokens_computed(engine, request(adapter="lora", salt="tenant")) == 67
    assert tokens_computed(engine, request(adapter="lora")) == 3
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    assert tokens_computed(engine, request(asked)) == 67
    engine.clear_prefix_cache()
    assert tokens_computed(engine, request()) == 67


def test_completions_of_one_prompt_share_its_pages(model, tiny_tokenizer):
    (prompt,) = prompts_of([40])
    options = EngineConfig(page_size=16, num_pages=32)
    engine = Engine(model, tiny_tokenizer, options)
    params = SamplingParams(temperature=1.0, seed=5, n=4, max_tokens=8, ignore_eos=True)
    request = Request(prompt_ids=prompt, params=params)
    engine.add(request)
    events = engine.step()
    assert sorted(e.index for e in events) == [0, 1, 2, 3]
    tables = [s.table for s in engine.scheduler.running]
    assert len({tuple(table.pages) for table in tables}) == 1
    assert 32 - engine.pool.available == 3  # 40 tokens
    events += engine.step()
    assert 32 - engine.pool.available == 2 + 4  # the last page is now separate for each completion
    assert len({table.pages[0] for table in tables}) == 1
    while engine.busy:
        events += engine.step()
    by_index = [[e.token_id for e in events if e.index == i] for i in range(4)]
    assert len({tuple(ids) for ids in by_index}) == 4
    first = SamplingParams(temperature=1.0, seed=5, max_tokens=8, ignore_eos=True)
    (alone,) = results(engine, [Request(prompt_ids=prompt, params=first)])
    assert by_index[0] == alone[0].token_ids  # n adds completions without changing the first


def test_best_of_returns_the_completions_with_the_highest_mean_logprob(model, tiny_tokenizer):
    (prompt,) = prompts_of([9])
    shared = {"temperature": 1.0, "seed": 8, "max_tokens": 6}
    engine = Engine(model, tiny_tokenizer)

    def ask(**options):
        request = Request(prompt_ids=prompt, params=SamplingParams(**shared, **options))
        return results(engine, [request])[0]

    def mean(completion):
        return sum(completion.logprobs) / len(completion.logprobs)

    every = sorted(ask(n=6), key=mean, reverse=True)
    best = ask(n=2, best_of=6)
    assert [c.token_ids for c in best] == [c.token_ids for c in every[:2]]
