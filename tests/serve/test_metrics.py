"""Metrics of requests and engines."""

import threading
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from easyllm.engine.params import SamplingParams
from easyllm.engine.request import Request, TokenEvent
from easyllm.serve.metrics import Metrics
from easyllm.serve.trace import RequestTrace


@pytest.fixture
def metrics():
    return Metrics()


def values(metrics):
    """All samples of the page by name and label values."""
    found = {}
    for family in text_string_to_metric_families(metrics.render()):
        for sample in family.samples:
            key = (sample.name.removeprefix("easyllm_"), *sample.labels.values())
            assert key not in found, "each sample is listed once"
            found[key] = sample.value
    return found


def request(num_prompt=10, n=1):
    return Request(prompt_ids=tuple(range(num_prompt)), params=SamplingParams(n=n))


def event(token_id=5, **changes):
    fields = {"request_id": 0, "token_id": token_id, "text": "x", "logprob": -1.0}
    return TokenEvent(**fields | changes)


def watched(metrics, trace=None, **changes):
    return metrics.watch("m", request(**changes), trace or RequestTrace(arrived_s=100.0))


def test_the_course_of_a_request_is_recorded(metrics):
    trace = RequestTrace(arrived_s=100.0)
    watch = watched(metrics, trace)
    watch.take([event(cached_tokens=4)], now_s=101.0)
    watch.take([event()], now_s=101.2)
    watch.take([event(finish_reason="length")], now_s=101.6)
    found = values(metrics)
    assert found["prompt_tokens_total", "m"] == 10
    assert found["prompt_tokens_cached_total", "m"] == 4
    assert found["generation_tokens_total", "m"] == 3
    assert found["requests_finished_total", "m", "length"] == 1
    assert found["time_to_first_token_seconds_sum", "m"] == pytest.approx(1.0)
    assert found["inter_token_latency_seconds_count", "m"] == 2
    assert found["inter_token_latency_seconds_sum", "m"] == pytest.approx(0.6)
    assert found["e2e_request_latency_seconds_sum", "m"] == pytest.approx(1.6)
    assert (trace.prompt_tokens, trace.cached_tokens, trace.completion_tokens) == (10, 4, 3)
    assert trace.first_token_after_s == pytest.approx(1.0)
    assert trace.finish_reasons == ["length"]


def test_queue_time_ends_when_the_engine_begins(metrics):
    watch = watched(metrics)
    watch.started(watch._submitted_s + 0.5)
    assert values(metrics)["request_queue_time_seconds_sum", "m"] == pytest.approx(0.5)


def test_accepted_draft_tokens_share_the_time_of_their_step(metrics):
    watch = watched(metrics)
    watch.take([event()], now_s=101.0)
    watch.take([event(), event(), event()], now_s=101.3)
    found = values(metrics)
    assert found["inter_token_latency_seconds_count", "m"] == 3
    assert found["inter_token_latency_seconds_sum", "m"] == pytest.approx(0.3)
    assert found["inter_token_latency_seconds_bucket", "m", "0.1"] == 3
    assert found["inter_token_latency_seconds_bucket", "m", "0.075"] == 0


def test_completions_in_one_batch_each_wait_for_the_whole_step(metrics):
    watch = watched(metrics, n=2)
    watch.take([event(index=0), event(index=1)], now_s=101.0)
    watch.take([event(index=0), event(index=1)], now_s=101.3)
    found = values(metrics)
    assert found["inter_token_latency_seconds_count", "m"] == 2
    assert found["inter_token_latency_seconds_sum", "m"] == pytest.approx(0.6)


def test_a_request_ends_with_its_last_completion(metrics):
    watch = watched(metrics, n=2)
    watch.take([event(index=0, finish_reason="stop"), event(index=1)], now_s=101.0)
    assert ("e2e_request_latency_seconds_count", "m") not in values(metrics)
    watch.take([event(index=1, finish_reason="length")], now_s=102.0)
    found = values(metrics)
    assert found["e2e_request_latency_seconds_count", "m"] == 1
    assert found["requests_finished_total", "m", "stop"] == 1
    assert found["requests_finished_total", "m", "length"] == 1


def test_an_event_without_a_token_is_not_counted_as_one(metrics):
    watch = watched(metrics)
    watch.take([event()], now_s=101.0)
    watch.take([event(token_id=None, finish_reason="stop")], now_s=102.0)
    found = values(metrics)
    assert found["generation_tokens_total", "m"] == 1
    assert ("inter_token_latency_seconds_count", "m") not in found


def test_abandoned_completions_are_counted_once_and_only_if_unfinished(metrics):
    watch = watched(metrics, n=3)
    watch.take([event(index=0, finish_reason="stop")], now_s=101.0)
    watch.abandoned("abort")
    watch.abandoned("error")
    found = values(metrics)
    assert found["requests_finished_total", "m", "abort"] == 2
    assert ("requests_finished_total", "m", "error") not in found


def test_several_engine_requests_of_one_http_request_add_up_in_its_trace(metrics):
    trace = RequestTrace(arrived_s=100.0)
    for now_s in (101.0, 103.0):
        watched(metrics, trace).take([event(finish_reason="stop")], now_s=now_s)
    assert (trace.prompt_tokens, trace.completion_tokens) == (20, 2)
    assert trace.first_token_after_s == pytest.approx(1.0)


def test_responses_are_counted_by_route_and_status(metrics):
    for status in (200, 200, 404):
        metrics.responded(RequestTrace(method="POST", route="/v1/x", status=status))
    metrics.responded(RequestTrace(method="POST", route="/v1/x", client_gone=True))
    metrics.responded(RequestTrace(method="POST", route="/v1/x"))
    counts = {key[-1]: n for key, n in values(metrics).items() if key[0] == "http_requests_total"}
    assert counts == {"200": 2, "404": 1, "499": 1, "500": 1}


def engine(running=2, waiting=3, available=25, num_pages=100, preempted=7):
    scheduler = SimpleNamespace(
        running=[0] * running, waiting=[0] * waiting, num_preemptions=preempted
    )
    pool = SimpleNamespace(available=available, num_pages=num_pages)
    return SimpleNamespace(scheduler=scheduler, pool=pool)


def test_an_engines_numbers_are_read_when_the_page_is_rendered(metrics):
    one = engine()
    metrics.add_engine("m", one, undelivered=lambda: 4)
    found = values(metrics)
    assert found["num_requests_running", "m"] == 2
    assert found["num_requests_waiting", "m"] == 7
    assert found["kv_cache_usage_perc", "m"] == 0.75
    assert found["num_preemptions_total", "m"] == 7
    one.scheduler.running.clear()
    assert values(metrics)["num_requests_running", "m"] == 0


def test_totals_are_zero_before_the_first_request(metrics):
    metrics.add_engine("m", engine())
    found = values(metrics)
    for name in ("prompt_tokens", "prompt_tokens_cached", "generation_tokens"):
        assert found[f"{name}_total", "m"] == 0


def test_totals_remain_when_an_engine_is_removed(metrics):
    metrics.add_engine("m", engine())
    watched(metrics).take([event(finish_reason="stop")], now_s=101.0)
    metrics.remove_engine("m")
    found = values(metrics)
    assert found["generation_tokens_total", "m"] == 1
    assert ("num_requests_running", "m") not in found


def test_no_count_of_several_threads_is_lost(metrics):
    def work():
        for _ in range(500):
            watched(metrics).take([event(finish_reason="stop")], now_s=101.0)
            metrics.render()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = values(metrics)
    assert found["generation_tokens_total", "m"] == 2000
    assert found["time_to_first_token_seconds_count", "m"] == 2000
