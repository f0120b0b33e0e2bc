"""Statistics of a load test."""

from array import array

import numpy as np
import pytest

from easyllm.serve.load_stats import Answer, Run, quantiles, span


def answer(start_s=0.0, **changes):
    fields = {
        "end_s": start_s + 1.0,
        "first_s": start_s + 0.2,
        "last_s": start_s + 0.9,
        "gaps_s": array("d", [0.3, 0.4]),
        "chunks": 3,
        "prompt_tokens": 10,
        "completion_tokens": 4,
    }
    return Answer(start_s, **fields | changes)


def summary(*answers, start_s=0.0, end_s=4.0, **changes):
    return Run(start_s, end_s, list(answers), **changes).summary()


@pytest.mark.parametrize("size", [1, 2, 3, 50, 101])
def test_quantiles_are_numpys(size):
    values = np.random.default_rng(size).exponential(size=size).tolist()
    found = quantiles(values)
    assert found["mean"] == pytest.approx(np.mean(values))
    for name, share in (("p50", 50), ("p95", 95), ("p99", 99)):
        assert found[name] == pytest.approx(np.percentile(values, share))


def test_nothing_measured_has_no_quantiles():
    assert quantiles([]) is None
    assert span([]) is None


def test_rates_are_over_the_whole_run():
    found = summary(answer(0.0), answer(1.0), cpu_s=0.2)
    assert found["requests_per_s"] == 0.5
    assert found["output_tokens_per_s"] == 2
    assert found["total_tokens_per_s"] == 7
    assert found["mean_open_requests"] == 0.5
    assert found["client_cpu_share"] == pytest.approx(0.05)


def test_latencies_are_relative_to_each_request():
    found = summary(answer(0.0), answer(2.0, first_s=2.6, gaps_s=array("d", [0.5])))
    assert found["first_token_s"]["mean"] == pytest.approx(0.4)
    assert found["inter_token_s"]["mean"] == pytest.approx(0.4)
    assert found["latency_s"]["p99"] == pytest.approx(1.0)


def test_failed_requests_count_only_as_errors():
    found = summary(answer(), answer(error="HTTP 500", detail="x", end_s=99.0))
    assert found["latency_s"]["mean"] == 1
    assert found["output_tokens_per_s"] == 1
    assert found["errors"] == {"HTTP 500": {"count": 1, "example": "x"}}


def test_the_first_example_of_an_error_is_kept():
    found = summary(answer(error="a", detail="1"), answer(error="b"), answer(error="b", detail="2"))
    assert list(found["errors"].items()) == [
        ("b", {"count": 2, "example": ""}),
        ("a", {"count": 1, "example": "1"}),
    ]


def test_an_answer_without_text_has_no_first_token():
    found = summary(answer(first_s=None, gaps_s=array("d"), chunks=0))
    assert found["without_text"] == 1
    assert found["first_token_s"] is None
    assert found["latency_s"]["mean"] == 1


def test_tokens_are_chunks_where_the_server_does_not_count():
    found = summary(answer(completion_tokens=None, prompt_tokens=None))
    assert (found["tokens_counted_by"], found["output_tokens"]["mean"]) == ("chunks", 3)
    assert found["total_tokens_per_s"] is None


def test_cached_tokens_are_summed_if_the_server_reports_them():
    assert summary(answer(), answer(cached_tokens=5))["cached_tokens"] == 5
    assert summary(answer())["cached_tokens"] is None
