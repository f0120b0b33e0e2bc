"""The engine: a request's output does not depend on what shares its batch, pages and prefix."""

import copy

import pytest
import torch

from conftest import build_tiny
from easyllm.adapters import LoRAConfig
from easyllm.adapters.attach import place
from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, Completion, Engine, EngineConfig, Request, SamplingParams
from easyllm.nn.config import AttentionConfig, LinearAttentionConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.position_config import Rope
from masks import RuleMask, packed

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def model():
    """In fp64: in fp32 the rounding of a row depends on the number of rows."""
    return build_tiny(seed=3).double()


def prompts_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, 320, (n,), generator=generator).tolist()) for n in lengths]


def results(engine, requests):
    """Returns the completions of each request as a list."""
    done = {request.id: Completion() for request in requests}
    for event in engine.run(requests):
        done[event.request_id].take(event)
    return [[done[r.id], *done[r.id].others] for r in requests]


def ids_of(completions):
    return [[c.token_ids for c in several] for several in completions]


MIXED = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0.8, "top_k": 30, "seed": 1},
    {"temperature": 1.1, "top_p": 0.8, "min_p": 0.01, "seed": 2, "n": 2},
    {"temperature": 1.0, "typical_p": 0.7, "seed": 3, "logprobs": 2},
    {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "min_tokens": 3},
    {"temperature": 0, "no_repeat_ngram_size": 2, "logit_bias": {5: 4.0, 9: -100.0}},
    {"temperature": 0, "prompt_logprobs": 1},
]


def mixed_requests(count, longest=90, more=0):
    lengths = [1 + (37 * i) % longest for i in range(count)]
    return [
        Request(
            prompt_ids=prompt,
            params=SamplingParams(**{"max_tokens": 4 + i % 17 + more} | MIXED[i % len(MIXED)]),
        )
        for i, prompt in enumerate(prompts_of(lengths))
    ]


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


def layered(*mixers):
    """Returns the tiny model with other mixers, in fp64."""
    model = build_tiny(seed=3)
    layers = tuple(model.config.layers[0].model_copy(update={"mixer": mixer}) for mixer in mixers)
    other = type(model)(model.config.changed(layers=layers)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        torch.nn.init.uniform_(parameter, -0.4, 0.6, generator=generator)
    return other.requires_grad_(False).eval()


SOFTMAX = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
KINDS = {
    "windows": [AttentionConfig(**SOFTMAX, window=w) for w in (5, 9)],
    "one window": [AttentionConfig(**SOFTMAX, window=5), AttentionConfig(**SOFTMAX)],
    "sinks": [AttentionConfig(**SOFTMAX, window=6, num_sinks=2)] * 2,
    "linear": [LinearAttentionConfig(num_heads=2, head_dim=16)] * 2,
    "linear and softmax": [
        LinearAttentionConfig(num_heads=2, head_dim=16, position=Rope()),
        AttentionConfig(**SOFTMAX),
    ],
}


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


# ---- prefixes


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


# ---- text, ends of generation, logprobs


def test_streaming_equals_not_streaming(model, tiny_tokenizer):
    llm = LLM(model=model, tokenizer=tiny_tokenizer)
    for params in (
        SamplingParams(temperature=0, max_tokens=40),
        SamplingParams(temperature=1.2, seed=3, n=3, max_tokens=30, stop=("e", "xy")),
    ):
        prompt = llm.encode("The quick brown")
        streamed = Completion()
        for event in llm.stream(prompt, params):
            streamed.take(event)
        (whole,) = llm.generate([prompt], params)
        assert streamed == whole
        for completion in (whole, *whole.others):
            text = tiny_tokenizer.decode(completion.token_ids)
            assert text.startswith(completion.text)
            assert completion.finish_reason == "stop" or text == completion.text


def test_no_completion_ends_before_min_tokens(model, tiny_tokenizer):
    (prompt,) = prompts_of([5])
    engine = Engine(model, tiny_tokenizer)
    plain = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    (free,) = results(engine, [Request(prompt_ids=prompt, params=plain)])
    third = free[0].token_ids[2]
    stops = {"temperature": 0, "max_tokens": 30, "ignore_eos": True, "stop_token_ids": (third,)}
    (stopped,) = results(engine, [Request(prompt_ids=prompt, params=SamplingParams(**stops))])
    assert stopped[0].finish_reason == "stop"
    assert len(stopped[0].token_ids) <= 3
    longer = SamplingParams(**stops, min_tokens=10)
    (late,) = results(engine, [Request(prompt_ids=prompt, params=longer)])
    assert len(late[0].token_ids) >= 10
    assert third not in late[0].token_ids[:9]


def test_logprobs_are_reported_raw_and_processed(model, tiny_tokenizer):
    (prompt,) = prompts_of([6])
    params = SamplingParams(
        temperature=0.5, top_k=3, seed=1, max_tokens=5, logprobs=4, ignore_eos=True
    )
    (done,) = results(Engine(model, tiny_tokenizer), [Request(prompt_ids=prompt, params=params)])
    ids = [*prompt, *done[0].token_ids]
    logits = model.logits(ids)
    for at, entry in enumerate(done[0].details, start=len(prompt)):
        raw = logits[at - 1].log_softmax(-1)
        assert entry.token_id == ids[at]
        assert entry.raw == pytest.approx(raw[ids[at]].item(), abs=1e-9)
        assert entry.raw == pytest.approx(done[0].logprobs[at - len(prompt)], abs=1e-12)
        best = raw.topk(4)
        assert [i for i, _ in entry.top_raw] == best.indices.tolist()
        three = (logits[at - 1].topk(3).values / 0.5).log_softmax(-1)
        assert len(entry.top_processed) == 3  # top-k leaves no more candidates
        assert [v for _, v in entry.top_processed] == pytest.approx(three.tolist(), abs=1e-9)
        assert entry.processed in [v for _, v in entry.top_processed]


def only_even(output):
    """Allows even ids, and ends after five."""
    return range(4, 320, 2) if len(output) < 5 else []


def test_a_mask_forbids_tokens_and_may_end_the_output(model, tiny_tokenizer):
    prompts = prompts_of([4, 7])
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    masked = Request(prompt_ids=prompts[0], params=params, mask=RuleMask(only_even))
    plain = Request(prompt_ids=prompts[1], params=params)
    (even,), (free,) = results(Engine(model, tiny_tokenizer), [masked, plain])
    assert len(even.token_ids) == 5
    assert all(i % 2 == 0 for i in even.token_ids)
    assert even.finish_reason == "stop"
    (alone,) = results(Engine(model, tiny_tokenizer), [plain])
    assert free.token_ids == alone[0].token_ids


def test_each_completion_of_a_request_has_a_separate_mask(model, tiny_tokenizer):
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=9, n=3, ignore_eos=True)
    request = Request(prompt_ids=(5, 6, 7), params=params, mask=RuleMask(only_even))
    (completions,) = results(Engine(model, tiny_tokenizer), [request])
    assert [len(each.token_ids) for each in completions] == [5, 5, 5]
    assert all(token % 2 == 0 for each in completions for token in each.token_ids)


@pytest.mark.parametrize(
    "allows",
    [
        lambda: 1 / 0,
        lambda: packed([5, 325], size=330),
        lambda: packed([5]).float(),
        lambda: packed([5])[None],
    ],
    ids=["raises", "an unknown id", "not integers", "two axes"],
)
def test_a_failing_mask_ends_only_its_own_request(model, tiny_tokenizer, allows, caplog):
    prompts = prompts_of([4, 7])
    params = SamplingParams(**GREEDY)
    broken = Request(
        prompt_ids=prompts[0],
        params=params,
        mask=RuleMask(lambda output: None if len(output) < 3 else allows()),
    )
    plain = Request(prompt_ids=prompts[1], params=params)
    engine = Engine(model, tiny_tokenizer)
    (ended,), (free,) = results(engine, [broken, plain])
    assert ended.finish_reason == "cancelled"
    assert len(ended.token_ids) == 3
    assert "a token mask failed" in caplog.text
    (alone,) = results(Engine(model, tiny_tokenizer), [plain])
    assert free.token_ids == alone[0].token_ids
    assert engine.pool.available == engine.pool.num_pages


def test_a_cancelled_request_frees_its_pages_immediately_in_any_state(model, tiny_tokenizer):
    options = EngineConfig(page_size=4, num_pages=24, max_running=4, max_step_tokens=10)
    engine = Engine(model, tiny_tokenizer, options)
    long = [
        Request(prompt_ids=p, params=SamplingParams(**GREEDY | {"n": 2}))
        for p in prompts_of([25, 30, 8])
    ]
    for steps in (0, 1, 2, 4, 6, 8):
        for request in long:
            engine.add(request)
        for _ in range(steps):
            engine.step()
        for request in long:
            engine.cancel(request.id)
            engine.scheduler.check()
        assert not engine.busy
        assert engine.pool.available == 24
    engine.cancel(long[0].id)  # cancelling twice has no effect


def test_closing_a_stream_early_frees_its_pages(model, tiny_tokenizer):
    llm = LLM(model=model, tokenizer=tiny_tokenizer)
    stream = llm.stream([5, 6, 7], SamplingParams(max_tokens=50, seed=0))
    next(stream)
    stream.close()
    assert not llm.engine.busy
    assert llm.engine.pool.available == llm.engine.pool.num_pages


def test_interleaved_streams_get_their_own_tokens(model, tiny_tokenizer):
    llm = LLM(model=model, tokenizer=tiny_tokenizer)
    prompts = prompts_of([5, 9])
    params = SamplingParams(**GREEDY)
    alone = [[e.token_id for e in llm.stream(p, params)] for p in prompts]
    first, second = (llm.stream(p, params) for p in prompts)
    pairs = list(zip(first, second, strict=True))
    assert [[e.token_id for e in side] for side in zip(*pairs, strict=True)] == alone


def test_a_cached_prefix_as_long_as_the_cache_leaves_space_to_continue(tiny_tokenizer):
    """Tests that reused pages leave space for the remaining prompt.

    With sliding windows a prompt may be longer than the total cache.
    """
    model = layered(*KINDS["windows"])
    options = EngineConfig(page_size=4, num_pages=8, max_running=1, max_step_tokens=12)
    engine = Engine(model, tiny_tokenizer, options)
    (prompt,) = prompts_of([60])
    params = SamplingParams(temperature=0, max_tokens=2)
    results(engine, [Request(prompt_ids=prompt[:32], params=params)])
    engine.pool.check([])
    longer = Request(prompt_ids=prompt, params=params)
    assert ids_of(results(engine, [longer])) == ids_of(
        results(Engine(model, tiny_tokenizer), [longer])
    )


def events_after_a_failing_step(engine, monkeypatch, *broken):
    """Makes one step fail in `broken` (arguments of `setattr`) and runs the engine to the end."""
    with monkeypatch.context() as patch:
        patch.setattr(*broken, lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.scheduler.check()
    events = []
    while engine.busy:
        events += engine.step()
    return events


def test_after_a_failed_step_everything_is_recomputed(model, tiny_tokenizer, monkeypatch):
    requests = mixed_requests(6)
    engine = Engine(model, tiny_tokenizer)
    for request in requests:
        engine.add(request)
    events = engine.step()
    events += events_after_a_failing_step(engine, monkeypatch, engine.runner.model, "head")
    alone = results(Engine(model, tiny_tokenizer), requests)
    for request, completions in zip(requests, alone, strict=True):
        for index, completion in enumerate(completions):
            mine = [e for e in events if (e.request_id, e.index) == (request.id, index)]
            assert [e.token_id for e in mine] == completion.token_ids


@pytest.mark.parametrize("kind", ["windows", "linear", "linear and softmax"])
def test_a_step_that_fails_after_its_forward_pass_does_not_advance_states(
    kind, tiny_tokenizer, monkeypatch
):
    """The pass has advanced recurrent states but no token has been chosen, so it is recomputed."""
    model = layered(*KINDS[kind])
    requests = [Request(prompt_ids=p, params=SamplingParams(**GREEDY)) for p in prompts_of([5, 9])]
    engine = Engine(model, tiny_tokenizer)
    for request in requests:
        engine.add(request)
    events = [event for _ in range(3) for event in engine.step()]
    events += events_after_a_failing_step(engine, monkeypatch, "easyllm.engine.engine.sample_slots")
    alone = results(Engine(model, tiny_tokenizer), requests)
    for request, (completion,) in zip(requests, alone, strict=True):
        mine = [e for e in events if e.request_id == request.id]
        assert [e.token_id for e in mine] == completion.token_ids
        assert [e.logprob for e in mine] == pytest.approx(completion.logprobs, abs=1e-9)


def test_a_failure_on_one_completions_logits_ends_only_that_request(
    model, tiny_tokenizer, monkeypatch, caplog
):
    prompts = prompts_of([4, 7])
    odd = SamplingParams(**GREEDY, no_repeat_ngram_size=2)
    broken = Request(prompt_ids=prompts[0], params=odd)
    plain = Request(prompt_ids=prompts[1], params=SamplingParams(**GREEDY))
    engine = Engine(model, tiny_tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr("easyllm.engine.sampling.repeated_ngrams", lambda *_: 1 / 0)
        (ended,), (free,) = results(engine, [broken, plain])
    assert ended.finish_reason == "cancelled"
    assert not ended.token_ids
    assert "processing the logits of a completion failed" in caplog.text
    (alone,) = results(engine, [plain])
    assert free.token_ids == alone[0].token_ids
    assert engine.pool.available == engine.pool.num_pages


def test_weights_changed_while_requests_run_leave_nothing_stale(tiny_tokenizer):
    model = build_tiny(seed=3).double()
    engine = Engine(model, tiny_tokenizer)
    (prompt,) = prompts_of([40])
    request = Request(prompt_ids=prompt, params=SamplingParams(**GREEDY))
    engine.add(request)
    events = [event for _ in range(4) for event in engine.step()]
    for parameter in model.parameters():
        parameter.mul_(0.9)
    engine.clear_prefix_cache()
    while engine.busy:
        events += engine.step()
    ids = [*prompt, *(e.token_id for e in events)]
    expected = model.logits(ids).argmax(-1).tolist()
    assert ids[44:] == expected[43:-1]  # the new weights apply from the fifth token
    (again,) = results(engine, [request])
    (fresh,) = results(Engine(model, tiny_tokenizer), [request])
    assert again[0].logprobs == pytest.approx(fresh[0].logprobs, abs=1e-9)


# ---- refusals

REFUSED = [
    ({}, {"prompt_ids": ()}, "the prompt is empty"),
    ({}, {"prompt_ids": (5,) * 300}, "the prompt has 300 tokens, but the model's context of 256"),
    ({}, {"prompt_ids": (5, 320)}, "token id 320, but the model has ids 0 to 319"),
    ({}, {"prompt_ids": (-1, 5)}, "token id -1, but the model has ids 0 to 319"),
    ({}, {"logit_bias": {4000: 1.0}}, "logit_bias contains token id 4000"),
    ({}, {"stop_token_ids": (320,)}, "stop_token_ids contains token id 320"),
    ({"max_running": 3}, {"n": 4}, "needs 4 completions, but at most 3 sequences run at once"),
    (
        {"num_pages": 5},
        {"prompt_ids": (5,) * 90},
        "101 tokens of KV cache .90 prompt tokens, 12 to generate., .* has space for 80",
    ),
    ({"num_pages": 5}, {"max_tokens": 200}, "has space for 80; shorten the prompt"),
]


@pytest.mark.parametrize(("options", "changes", "message"), REFUSED)
def test_requests_that_can_never_be_served_are_refused_when_added(
    model, tiny_tokenizer, options, changes, message
):
    engine = Engine(model, tiny_tokenizer, EngineConfig(**options))
    prompt = changes.get("prompt_ids", (5, 6))
    params = GREEDY | {k: v for k, v in changes.items() if k != "prompt_ids"}
    with pytest.raises(ConfigError, match=message):
        engine.add(Request(prompt_ids=prompt, params=SamplingParams(**params)))
    assert not engine.busy
    engine.add(Request(prompt_ids=(5, 6), params=SamplingParams(**GREEDY)))


def test_a_request_cannot_be_added_twice_at_a_time(model, tiny_tokenizer):
    engine = Engine(model, tiny_tokenizer)
    request = Request(prompt_ids=(5, 6), params=SamplingParams(**GREEDY))
    engine.add(request)
    with pytest.raises(ConfigError, match="is being served already"):
        engine.add(request)
    engine.cancel(request.id)
    assert len(results(engine, [request])[0][0].token_ids) == 12


def test_a_refused_run_does_not_disturb_the_run_serving_its_request(model, tiny_tokenizer):
    engine = Engine(model, tiny_tokenizer)
    request, other = (
        Request(prompt_ids=(5, number), params=SamplingParams(**GREEDY)) for number in (6, 7)
    )
    first = engine.run([request])
    events = [next(first)]
    with pytest.raises(ConfigError, match="is being served already"):
        next(engine.run([other, request]))
    assert list(engine._requests) == [request.id]  # what the refused run had added has been removed
    events += first
    assert len(events) == 12
    assert events[-1].finish_reason == "length"


def test_scoring_no_tokens_or_unknown_tokens_is_refused(model, tiny_tokenizer):
    llm = LLM(model=model, tokenizer=tiny_tokenizer)
    with pytest.raises(ConfigError, match="the prompt is empty; give at least one token"):
        llm.score("")
    with pytest.raises(ConfigError, match="token id 320, but the model has ids 0 to 319"):
        llm.score([5, 320])
    assert llm.score([5]) == []


def test_without_max_tokens_a_request_ends_when_the_cache_is_full(model, tiny_tokenizer):
    engine = Engine(model, tiny_tokenizer, EngineConfig(num_pages=3))
    params = SamplingParams(temperature=0, ignore_eos=True)
    (done,) = results(engine, [Request(prompt_ids=(5, 6, 7), params=params)])
    assert len(done[0].token_ids) == 48 - 3 + 1
    assert done[0].finish_reason == "length"


RANGES = [
    ("temperature", -0.1),
    ("temperature", 101),
    ("top_k", -1),
    *((name, 2**63) for name in ("top_k", "no_repeat_ngram_size", "min_tokens", "max_tokens")),
    ("logit_bias", {2**63: 1}),
    ("stop_token_ids", (2**63,)),
    ("top_p", 0),
    ("top_p", 1.1),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("typical_p", 0),
    ("typical_p", 2),
    ("repetition_penalty", 0),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -3),
    ("no_repeat_ngram_size", -1),
    ("logit_bias", {3: 101}),
    ("min_tokens", -1),
    ("max_tokens", 0),
    ("logprobs", -1),
    ("logprobs", 1000),
    ("prompt_logprobs", 129),
    ("n", 0),
    ("n", 129),
    ("best_of", 0),
    ("stop", ("",)),
    ("stop", ("x" * 1001,)),
    ("seed", 2**63),
    *((name, float("nan")) for name in ("temperature", "top_p", "min_p", "presence_penalty")),
    ("temperature", float("inf")),
]


@pytest.mark.parametrize(("name", "value"), RANGES)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        SamplingParams(**{name: value})
    assert "should" in str(caught.value)  # "... should be less than or equal to ..."


def test_contradictory_values_are_refused():
    with pytest.raises(ValueError, match="best_of=2 is less than n=3"):
        SamplingParams(n=3, best_of=2)
    with pytest.raises(ValueError, match="min_tokens=9 is more than max_tokens=3"):
        SamplingParams(min_tokens=9, max_tokens=3)
    with pytest.raises(ValueError, match="num_pages and cache_gb both set the cache size"):
        EngineConfig(num_pages=3, cache_gb=1.0)
    with pytest.raises(ValueError, match="max_running=99 is more than max_step_tokens=9"):
        EngineConfig(max_running=99, max_step_tokens=9)
