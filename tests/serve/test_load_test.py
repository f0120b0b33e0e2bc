"""The load generator against a fake server: what is sent, counted, measured and reported."""

import asyncio
import itertools
import math

import pytest

from easyllm.core.errors import ConfigError
from easyllm.serve.load_options import LoadOptions
from easyllm.serve.load_test import LoadTest
from fake_openai import FakeServer, serving


def measure(fake, *, prompts=None, api_key=None, suffix="", **options):
    values = {"requests": 6, "prompt_tokens": 20, "max_tokens": 5, "concurrency": (2,)} | options
    with serving(fake) as url:
        test = LoadTest(url + suffix, LoadOptions(**values), prompts=prompts, api_key=api_key)
        asyncio.run(test.run())
    return test.report()


def only(report):
    (run,) = report["runs"]
    return run


def test_a_closed_loop_keeps_its_clients_busy_and_measures_after_the_warm_up():
    fake = FakeServer(token_s=0.005, template=0)
    run = only(measure(fake, concurrency=(3,), requests=9))
    assert fake.open_at_once == 3
    assert len(fake.bodies) == 3 + 9
    assert (run["clients"], run["requests"], run["answered"], run["errors"]) == (3, 9, 9, {})
    assert 1.5 < run["mean_open_requests"] <= 3
    assert run["requests_per_s"] == pytest.approx(9 / run["seconds"])
    assert run["output_tokens_per_s"] == pytest.approx(9 * 5 / run["seconds"])
    assert run["total_tokens_per_s"] == pytest.approx(9 * 25 / run["seconds"])


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_address_may_end_in_v1(suffix):
    assert only(measure(FakeServer(), suffix=suffix, warmup=0))["answered"] == 6


def test_latencies_are_those_of_the_stream():
    run = only(measure(FakeServer(token_s=0.02), concurrency=(1,), requests=3))
    first, between, whole = (
        run[f"{k}_s"]["mean"] for k in ("first_token", "inter_token", "latency")
    )
    assert 0.02 <= first < 1
    assert 0.019 <= between < 1  # a chunk may arrive late, and the next one in time
    assert first + 4 * between <= whole < first + 4 * between + 1
    assert run["first_token_s"]["p50"] <= run["first_token_s"]["p99"]


def test_an_open_loop_does_not_wait_for_answers():
    fake = FakeServer(token_s=0.05)  # an answer takes 0.25 s
    run = only(measure(fake, concurrency=(), rate=(200.0,), requests=20, warmup=0))
    assert run["rate"] == 200
    assert fake.open_at_once > 5
    assert 0 <= run["sent_late_s"]["p50"] < 1


def test_arrivals_follow_the_rate_and_the_seed():
    fake = FakeServer(token_s=0, template=0)
    measure(fake, concurrency=(), rate=(400.0,), requests=100, warmup=0, max_tokens=2)
    times = fake.arrivals
    assert (times[-1] - times[0]) / 99 == pytest.approx(1 / 400, rel=0.4)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert max(gaps) > 2 / 400  # at random, not evenly


def test_several_loads_are_measured_one_after_the_other():
    report = measure(FakeServer(), concurrency=(1, 4))
    assert [run["clients"] for run in report["runs"]] == [1, 4]
    assert all(run["answered"] == 6 for run in report["runs"])


@pytest.mark.parametrize("dialect", ["chat", "completions"])
@pytest.mark.parametrize("tokenize", ["prompt", "content", None])
def test_prompts_have_the_exact_length(dialect, tokenize):
    fake = FakeServer(tokenize=tokenize)
    report = measure(fake, dialect=dialect)
    assert only(report)["prompt_tokens"] == {"mean": 20, "min": 20, "max": 20}
    assert report["notes"] == []


def test_words_of_several_tokens_are_left_out_where_the_server_tokenizes():
    fake = FakeServer(long_words={"time", "people", "education"})
    assert only(measure(fake))["prompt_tokens"] == {"mean": 20, "min": 20, "max": 20}
    sent = {word for body in fake.bodies for word in body["messages"][0]["content"].split()}
    assert not sent & fake.long_words
    assert len(sent) > 20


@pytest.mark.parametrize("target", [11, 12, 20, 37, 500])
def test_no_probe_is_longer_than_the_prompts_though_all_words_are_split(target):
    fake = FakeServer(tokenize=None, tokens_per_word=3)
    found = only(measure(fake, prompt_tokens=9 + 3 * target))
    assert found["prompt_tokens"] == {
        "mean": 9 + 3 * target,
        "min": 9 + 3 * target,
        "max": 9 + 3 * target,
    }
    assert fake.longest == 9 + 3 * target


def test_approximate_lengths_are_reported_as_the_server_counts_them():
    fake = FakeServer(tokenize=None, long_words={"time", "year", "people", "way", "day", "man"})
    report = measure(fake, prompt_tokens=60, requests=12)
    lengths = only(report)["prompt_tokens"]
    assert 55 < lengths["mean"] < 65
    assert lengths["min"] < lengths["max"]


def test_prompts_share_no_prefix_but_the_first_word():
    fake = FakeServer()
    measure(fake, requests=20)
    texts = [body["messages"][0]["content"] for body in fake.bodies]
    assert len(set(texts)) == len(texts)
    assert len({text.split()[1] for text in texts}) > 10


def test_the_same_seed_sends_the_same_prompts():
    fakes = [FakeServer(), FakeServer(), FakeServer()]
    for fake, seed in zip(fakes, (1, 1, 2), strict=True):
        measure(fake, seed=seed, concurrency=(1,))
    first, second, other = ([b["messages"] for b in fake.bodies] for fake in fakes)
    assert first == second
    assert first != other


def test_a_request_has_the_options_and_no_others():
    fake = FakeServer()
    measure(fake, dialect="completions", ignore_eos=True, model="fake")
    prompt = fake.bodies[-1].pop("prompt")
    assert fake.bodies[-1] == {
        "model": "fake",
        "max_tokens": 5,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    assert prompt.startswith("The ")


def test_tokens_are_counted_by_chunks_without_usage_and_that_is_said():
    report = measure(FakeServer(usage=False, per_chunk=2), max_tokens=6)
    run = only(report)
    assert run["tokens_counted_by"] == "chunks"
    assert run["output_tokens"]["mean"] == 3
    assert run["total_tokens_per_s"] is None
    assert any("does not count" in note for note in report["notes"])


def test_chunks_of_several_tokens_are_counted_by_usage():
    run = only(measure(FakeServer(per_chunk=3), max_tokens=6))
    assert run["tokens_counted_by"] == "usage"
    assert run["output_tokens"]["mean"] == 6
    assert run["chunks_per_output_token"] == pytest.approx(1 / 3)
    assert run["cached_tokens"] == 12


STREAMS = {
    "error in the stream": b'data: {"error": {"message": "engine failed"}}\n\n',
    "the stream ended early": b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n',
    "an event is not a JSON object": b"data: [1]\n\n",
}


def test_failures_are_counted_by_kind_and_excluded_from_the_rest():
    faults = {0: 429, 1: 429, 2: 500}
    faults |= {3 + i: stream for i, stream in enumerate(STREAMS.values())}
    report = measure(FakeServer(faults=faults), warmup=0, requests=10, concurrency=(1,))
    run = only(report)
    counts = {kind: each["count"] for kind, each in run["errors"].items()}
    assert counts == {"HTTP 429": 2, "HTTP 500": 1} | dict.fromkeys(STREAMS, 1)
    assert next(iter(counts)) == "HTTP 429"
    assert run["errors"]["HTTP 429"]["example"] == "at fault"
    assert run["errors"]["error in the stream"]["example"] == "engine failed"
    assert (run["requests"], run["answered"]) == (10, 4)
    assert run["output_tokens"] == {"mean": 5, "min": 5, "max": 5}


def test_failures_of_the_warm_up_are_noted():
    report = measure(FakeServer(faults={0: 503}), warmup=2, concurrency=(1,))
    assert report["notes"] == ["1 client: warm-up requests that failed: 1 × HTTP 503"]
    assert only(report)["errors"] == {}


def test_a_run_without_any_answer_has_no_latencies():
    run = only(measure(FakeServer(faults=dict.fromkeys(range(99), 500)), warmup=0))
    assert (run["answered"], run["latency_s"], run["output_tokens_per_s"]) == (0, None, 0)


@pytest.mark.parametrize(
    ("fake", "options", "message"),
    [
        ({"models": ["a", "b"]}, {}, "lists the models a, b; name one with --model"),
        ({"models": []}, {}, "lists no model; name one with --model"),
        ({"probe": 401}, {}, r"refuses requests \(HTTP 401: at fault\); give its key"),
        ({"probe": 400}, {}, r"refuses requests \(HTTP 400: at fault\)"),
        ({}, {"prompt_tokens": 3}, "set --prompt-tokens to at least 11"),
        ({"probe": b"hello"}, {}, r"no usable server .*\(the stream ended early: hello\)"),
    ],
)
def test_a_server_that_cannot_be_measured_is_refused(fake, options, message):
    with pytest.raises(ConfigError, match=message):
        measure(FakeServer(**fake), **options)


def test_an_unreachable_server_is_refused():
    with serving(FakeServer()) as url:
        pass
    with pytest.raises(ConfigError, match=r"no usable server at .*Connection refused"):
        asyncio.run(LoadTest(url, LoadOptions()).run())


def test_a_key_that_no_header_can_carry_is_refused():
    with pytest.raises(ConfigError, match="API key"):
        LoadTest("localhost", LoadOptions(), api_key="a\r\nX: y")


def test_what_was_measured_before_an_interruption_is_reported():
    async def run(url):
        test = LoadTest(url, LoadOptions(requests=1000, max_tokens=5, concurrency=(4,)))
        task = asyncio.create_task(test.run())
        while not test.runs or len(test.runs[0][1].answers) < 8:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return test.report()

    with serving(FakeServer(token_s=0.01)) as url:
        found = only(asyncio.run(run(url)))
    assert 8 <= found["answered"] < 20
    assert found["unanswered"] == 4
    assert found["errors"] == {}
    assert math.isfinite(found["output_tokens_per_s"])
