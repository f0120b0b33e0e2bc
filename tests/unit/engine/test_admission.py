"""Requests that cannot be served are refused when they are added, in one sentence."""

import pytest

from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, Engine, EngineConfig, Request, SamplingParams
from engine_requests import GREEDY, results
from tiny_models import build_tiny


@pytest.fixture(scope="module")
def model():
    """In fp64: in fp32 the rounding of a row depends on the number of rows."""
    return build_tiny(seed=3).double()


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
