"""The load generator and the metrics of our own server count the same."""

import asyncio
import logging

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from easyllm.engine import LLM
from easyllm.serve.load_options import LoadOptions
from easyllm.serve.load_test import LoadTest
from easyllm.serve.request_log import RequestLog
from running_server import running

SENT, MAX_TOKENS = 12, 6


@pytest.fixture(scope="module")
def llm(tiny_model, tiny_tokenizer):
    return LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")


@pytest.fixture(params=["chat", "completions"])
def measured(request, llm):
    """The report of a load test and the metrics of the server afterwards."""
    options = LoadOptions(
        dialect=request.param,
        concurrency=(4,),
        requests=SENT,
        warmup=0,
        prompt_tokens=60,
        max_tokens=MAX_TOKENS,
        ignore_eos=True,
    )
    with running({"m": llm}) as address:
        test = LoadTest(address, options)
        asyncio.run(test.run())
        answer = httpx.get(f"{address}/metrics")
    samples = {
        (sample.name.removeprefix("easyllm_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    return test.report(), samples, answer.headers


def test_every_answer_has_the_tokens_that_were_asked_for(measured):
    report, _, _ = measured
    (run,) = report["runs"]
    assert (report["model"], run["answered"], run["errors"]) == ("m", SENT, {})
    assert run["output_tokens"] == {"mean": MAX_TOKENS, "min": MAX_TOKENS, "max": MAX_TOKENS}
    assert run["prompt_tokens"]["mean"] == pytest.approx(60, abs=6)


def test_the_metrics_count_the_tokens_of_the_load_test_and_its_probes(measured):
    report, samples, headers = measured
    (run,) = report["runs"]
    requests = samples["time_to_first_token_seconds_count", "m"]
    probes = requests - SENT
    assert 2 <= probes <= 8
    assert samples["generation_tokens_total", "m"] == SENT * MAX_TOKENS + probes
    assert samples["requests_finished_total", "m", "length"] == requests
    assert samples["prompt_tokens_total", "m"] > run["prompt_tokens"]["mean"] * SENT
    assert samples["inter_token_latency_seconds_count", "m"] == SENT * (MAX_TOKENS - 1)
    route = f"/v1/{'chat/' if report['dialect'] == 'chat' else ''}completions"
    assert samples["http_requests_total", "POST", route, "200"] == requests
    assert samples["num_requests_running", "m"] == samples["kv_cache_usage_perc", "m"] == 0
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_the_log_has_one_line_a_request_without_its_text(llm, caplog):
    caplog.set_level(logging.INFO, logger="easyllm.requests")
    body = {"model": "m", "messages": [{"role": "user", "content": "hidden words"}]}
    with running({"m": llm}, log=RequestLog()) as address:
        url = f"{address}/v1/chat/completions"
        for changes in ({}, {"stream": True}, {"model": "unknown"}):
            asked = body | {"max_tokens": 4, "ignore_eos": True} | changes
            httpx.post(url, json=asked, headers={"Authorization": "Bearer hidden-key"})
    lines = [r.getMessage() for r in caplog.records if r.name == "easyllm.requests"]
    assert len(lines) == 3
    assert all("POST /v1/chat/completions" in line for line in lines)
    assert sum("completion_tokens=4" in line for line in lines) == 2
    assert sum("model=m " in line for line in lines) == 2
    assert "hidden" not in "".join(lines)
