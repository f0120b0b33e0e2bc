"""The engine's thread: events in order, one wake-up a step, and what is recorded on the way."""

import asyncio
import time

import pytest

from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, Request, SamplingParams
from easyllm.serve.metrics import Metrics
from easyllm.serve.service import EngineFailure, EngineService, ServerShuttingDown
from easyllm.serve.trace import RequestTrace


@pytest.fixture(scope="module")
def llm(tiny_model, tiny_tokenizer):
    return LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def service(llm, metrics):
    service = EngineService("m", llm, metrics)
    yield service
    service.close()
    assert not llm.engine.busy
    assert llm.engine.pool.available == llm.engine.pool.num_pages


def request(number=0, max_tokens=6, **changes):
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **changes)
    return Request(prompt_ids=(5, 6, 7, 8 + number), params=params)


async def ids_of(service, asked, trace=None):
    return [event.token_id async for event in service.generate(asked, trace)]


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def total(metrics, sample):
    lines = metrics.render().splitlines()
    return sum(float(x.rpartition(" ")[2]) for x in lines if x.startswith(f"easyllm_{sample}"))


def test_concurrent_requests_get_the_same_tokens_as_each_alone(service, llm):
    async def together():
        return await asyncio.gather(*(ids_of(service, request(n)) for n in range(5)))

    alone = [[e.token_id for e in llm.engine.run([request(n)])] for n in range(5)]
    assert asyncio.run(together()) == alone


def test_a_step_wakes_the_event_loop_once(service):
    async def run():
        loop = asyncio.get_running_loop()
        wake, calls = loop.call_soon_threadsafe, []

        def counted(callback, *values):
            calls.append(len(values[0]))
            return wake(callback, *values)

        loop.call_soon_threadsafe = counted
        await asyncio.gather(*(ids_of(service, request(n, max_tokens=20)) for n in range(4)))
        return calls

    calls = asyncio.run(run())
    assert sum(calls) == 4 * 20
    assert len(calls) < 40  # 20 steps, and some in which not all requests have arrived


def test_a_slow_reader_gets_several_steps_in_one_list(service):
    async def run():
        sizes = []
        async for events in service.batches(request(max_tokens=30)):
            sizes.append(len(events))
            await asyncio.sleep(0.05)
        return sizes

    sizes = asyncio.run(run())
    assert sum(sizes) == 30
    assert len(sizes) < 30


def test_a_rejected_request_raises_and_is_not_counted_as_finished(service, metrics):
    with pytest.raises(ConfigError, match="prompt is empty"):
        asyncio.run(ids_of(service, Request(prompt_ids=(), params=SamplingParams())))
    assert total(metrics, "requests_finished_total") == 0


def test_tokens_and_times_of_a_request_are_recorded(service, metrics):
    trace = RequestTrace(model="alias")
    asyncio.run(ids_of(service, request(), trace))
    assert (trace.prompt_tokens, trace.completion_tokens, trace.finish_reasons) == (
        4,
        6,
        ["length"],
    )
    assert 0 < trace.first_token_after_s <= trace.total_s
    label = '{model="alias"}'
    assert total(metrics, f"generation_tokens_total{label}") == 6
    assert total(metrics, f"inter_token_latency_seconds_count{label}") == 5
    for name in ("request_queue_time", "time_to_first_token", "e2e_request_latency"):
        assert total(metrics, f"{name}_seconds_count{label}") == 1


def test_a_cached_prompt_is_counted(service, metrics, llm):
    size = llm.engine.pool.page_size
    asked = [
        Request(prompt_ids=(9,) * (2 * size + 1), params=SamplingParams(max_tokens=1))
        for _ in range(2)
    ]
    for each in asked:
        asyncio.run(ids_of(service, each))
    assert total(metrics, "prompt_tokens_total") == 2 * (2 * size + 1)
    assert total(metrics, "prompt_tokens_cached_total") == 2 * size


def test_leaving_early_cancels_the_request_and_counts_it_as_aborted(service, metrics, llm):
    async def leave():
        events = service.generate(request(max_tokens=200))
        await anext(events)
        await events.aclose()

    asyncio.run(leave())
    assert wait_for(lambda: not llm.engine.busy)
    assert wait_for(lambda: total(metrics, 'requests_finished_total{model="m",finished') == 1)
    assert 'finished_reason="abort"' in metrics.render()


def test_waiting_requests_are_counted_while_a_step_runs(service, metrics, llm, monkeypatch):
    run = llm.engine.runner.run

    def slowly(step):
        time.sleep(0.3)
        return run(step)

    async def ask():
        tasks = [asyncio.create_task(ids_of(service, request(0, max_tokens=2)))]
        await asyncio.sleep(0.1)
        tasks += [asyncio.create_task(ids_of(service, request(n, max_tokens=1))) for n in (1, 2)]
        await asyncio.sleep(0.1)
        seen = total(metrics, "num_requests_waiting"), total(metrics, "num_requests_running")
        await asyncio.gather(*tasks)
        return seen

    monkeypatch.setattr(llm.engine.runner, "run", slowly)
    assert asyncio.run(ask()) == (2, 1)
    assert total(metrics, "num_requests_waiting") == 0


def test_a_failed_step_ends_running_requests_with_an_error(service, metrics, llm, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "run", lambda step: 1 / 0)
        with pytest.raises(EngineFailure, match="see the server's log"):
            asyncio.run(ids_of(service, request()))
    assert 'finished_reason="error"' in metrics.render()
    assert len(asyncio.run(ids_of(service, request()))) == 6


def test_events_before_an_error_are_delivered_first(service):
    async def run():
        events = service.batches(request(max_tokens=200))
        first = await anext(events)
        service.end(ServerShuttingDown("closing"))
        with pytest.raises(ServerShuttingDown):
            async for _ in events:
                pass
        with pytest.raises(ServerShuttingDown):
            await ids_of(service, request())
        return first

    assert asyncio.run(run())  # one event, or several if the reader was slower than the engine


def test_a_closed_service_is_not_in_the_metrics(llm, metrics):
    service = EngineService("m", llm, metrics)
    assert 'easyllm_num_requests_running{model="m"}' in metrics.render()
    service.close()
    assert 'easyllm_num_requests_running{model="m"}' not in metrics.render()
