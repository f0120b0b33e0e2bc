"""Text of completions: streaming, ends, log-probabilities, masks, cancellation, failures."""

import pytest

from easyllm.engine import LLM, Completion, Engine, EngineConfig, Request, SamplingParams
from engine_requests import GREEDY, KINDS, ids_of, layered, mixed_requests, prompts_of, results
from masks import RuleMask, packed
from tiny_models import build_tiny


@pytest.fixture(scope="module")
def model():
    """In fp64: in fp32 the rounding of a row depends on the number of rows."""
    return build_tiny(seed=3).double()


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
