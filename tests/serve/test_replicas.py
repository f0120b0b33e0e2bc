"""Replicas: the front answers as one server does, and a replica's death costs little."""

import asyncio
import json
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace

import httpx
import pytest

from easyllm.cli.adapter import load_served
from easyllm.core.cluster import cpus_each
from easyllm.core.errors import ConfigError
from easyllm.engine import LLM
from easyllm.serve.history import History
from easyllm.serve.limits import ServeLimits
from easyllm.serve.replicas.board import Report
from easyllm.serve.replicas.front import Replicas, create_front
from easyllm.serve.replicas.replica import Replica, Sources
from easyllm.serve.replicas.run import build_front_server, start_replicas
from easyllm.serve.run import bind
from running_server import QUESTION, running

CHAT = "/v1/chat/completions"
ASK = {"model": "m", "messages": QUESTION, "max_tokens": 8, "temperature": 0}


class Died(Exception):
    pass


@contextmanager
def serving(app, limits=None):
    """Runs a front in a thread and yields its address."""
    listener = bind("127.0.0.1", 0)
    server = build_front_server(app, limits or ServeLimits())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=60)


class Stream:
    """A replica's response in this process; it dies after a number of messages."""

    def __init__(self, messages, dies_after=None):
        self._messages, self._dies_after, self.cancelled = messages, dies_after, False

    async def __aiter__(self):
        count = 0
        async for found in self._messages:
            for message in found:
                if count == self._dies_after:
                    raise Died("killed")
                count += 1
                yield [message]

    def cancel(self):
        self.cancelled = True


@pytest.fixture(scope="module")
def llm(tiny_model, tiny_tokenizer):
    return LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")


@pytest.fixture(scope="module")
def replica(llm):
    loaded = SimpleNamespace(models={"m": llm}, adapters={}, loaders={})

    async def report(metrics, view):
        reports["r1"] = Report(time.monotonic(), metrics, view)

    reports = {}
    replica = Replica(Sources(load=lambda: loaded), ServeLimits(), report)
    return SimpleNamespace(answer=replica.answer, reports=reports)


@pytest.fixture
def front(replica):
    """Returns how a front is started; `deaths` says after how many messages each stream dies."""
    with ExitStack() as stack:

        def start(deaths=(), **options):
            streams, ends = [], list(deaths)

            def send(request):
                after = ends.pop(0) if ends else None
                streams.append(Stream(replica.answer(request), after))
                return streams[-1]

            async def reports():
                return replica.reports

            replicas = Replicas(send=send, died=(Died,), reports=reports)
            address = stack.enter_context(serving(create_front(replicas, **options)))
            return address, streams

        yield start


def test_the_front_answers_as_one_server_does(front, llm, tmp_path):
    history = History(tmp_path / "chats.sqlite")
    address, _ = front(history=history)
    with running({"m": llm}) as plain:

        def both(method, path, **options):
            return [httpx.request(method, f"{at}{path}", **options) for at in (address, plain)]

        for body in (ASK, ASK | {"n": 2}, ASK | {"max_tokens": -1}, ASK | {"model": "x"}):
            one, two = both("POST", CHAT, json=body)
            assert one.status_code == two.status_code
            key = "choices" if one.status_code == 200 else "error"
            assert one.json()[key] == two.json()[key]
        one, two = both("POST", CHAT, json=ASK | {"stream": True})
        assert one.headers["content-type"] == two.headers["content-type"]
        assert deltas(one.text) == deltas(two.text)
        one, two = both("GET", "/v1/models/m")
        assert one.json().keys() == two.json().keys()
        for path in ("/no/route", "/health", "/", "/assets/js/main.js"):
            one, two = both("GET", path)
            assert (one.status_code, one.text) == (two.status_code, two.text)
    assert httpx.get(f"{address}/easyllm/page").json() == {"history": True, "documents": False}
    (engine,) = httpx.get(f"{address}/easyllm/engine").json()["engines"]
    assert engine["name"] == "m · replica 1"
    assert 'replica="r1",model="m"' in httpx.get(f"{address}/metrics").text
    history.close()


def deltas(text):
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    assert lines[-1] == "[DONE]"
    return [choice["delta"] for chunk in chunks for choice in chunk["choices"]]


def test_a_key_is_checked_by_the_front(front):
    address, streams = front(api_key="k")
    assert httpx.post(f"{address}{CHAT}", json=ASK).status_code == 401
    assert streams == []
    headers = {"Authorization": "Bearer k"}
    assert httpx.post(f"{address}{CHAT}", json=ASK, headers=headers).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_death_before_the_response_begins_is_not_seen(front, llm, stream):
    address, streams = front(deaths=[0, 0])
    answer = httpx.post(f"{address}{CHAT}", json=ASK | {"stream": stream})
    assert answer.status_code == 200
    assert len(streams) == 3


def test_a_death_in_a_stream_ends_it_with_an_error_event(front):
    address, streams = front(deaths=[1])
    answer = httpx.post(f"{address}{CHAT}", json=ASK | {"stream": True})
    last = json.loads(answer.text.strip().splitlines()[-1].removeprefix("data: "))
    assert "has died" in last["error"]["message"]
    assert len(streams) == 1


def test_if_every_replica_dies_the_answer_is_503(front):
    address, _ = front(deaths=[0] * 5)
    answer = httpx.post(f"{address}{CHAT}", json=ASK, timeout=60)
    assert answer.status_code == 503
    assert "no replica" in answer.json()["error"]["message"]


def test_a_client_that_leaves_ends_its_request(front, llm):
    address, streams = front()
    body = ASK | {"stream": True, "max_tokens": 200, "ignore_eos": True}
    with httpx.stream("POST", f"{address}{CHAT}", json=body) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 60
    while not streams[0].cancelled or llm.engine.busy:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_stored_responses_are_refused(front):
    address, _ = front()
    body = {"model": "m", "input": "x", "max_output_tokens": 2}
    first = httpx.post(f"{address}/v1/responses", json=body)
    assert first.status_code == 200
    again = httpx.post(
        f"{address}/v1/responses", json=body | {"previous_response_id": first.json()["id"]}
    )
    assert again.status_code == 400
    assert "not kept by a server with --replicas" in again.json()["error"]["message"]


def test_cores_are_divided_so_that_every_replica_fits():
    assert cpus_each([8], 2) == 4
    assert cpus_each([8, 8], 3) == 4  # 5 would leave no node for the third
    assert cpus_each([2], 3) == 0.666


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_replicas_on_ray_serve(tiny_folder):
    """Two answer as one; 100 parallel streams; one that is killed costs no waiting request."""
    pytest.importorskip("ray.serve")
    import ray

    body = ASK | {"stream": True, "ignore_eos": True}
    with ExitStack() as stack:
        sources = Sources(load=partial(load_served, {"m": str(tiny_folder)}))
        limits = ServeLimits(max_waiting=1000)
        replicas = start_replicas(sources, 2, limits=limits, stack=stack)
        address = stack.enter_context(serving(create_front(replicas)))
        with httpx.Client(base_url=address, timeout=120) as client:
            answers = [client.post(CHAT, json=ASK).json() for _ in range(6)]
            whole = {answer["choices"][0]["message"]["content"] for answer in answers}
            assert len(whole) == 1
        assert len(set(asyncio.run(many(address, body, 100)))) == 1
        reports = _until(lambda: asyncio.run(replicas.reports()), both_took_part)
        victim = next(iter(reports))
        names = ray.util.list_named_actors(all_namespaces=True)
        found = next(each for each in names if victim in each["name"])

        async def killed():
            requests = asyncio.create_task(many(address, ASK, 40))
            await asyncio.sleep(0.05)
            ray.kill(ray.get_actor(found["name"], namespace=found["namespace"]))
            return await requests

        assert len(set(asyncio.run(killed()))) == 1


def both_took_part(reports):
    served = [report.view["engines"][0]["generated_tokens"] for report in reports.values()]
    return len(served) == 2 and min(served) > 8


async def many(address, body, count):
    """Returns the texts of parallel requests."""
    async with httpx.AsyncClient(base_url=address, timeout=300) as client:

        async def one():
            answer = await client.post(CHAT, json=body)
            assert answer.status_code == 200
            if body.get("stream"):
                return "".join(each.get("content", "") for each in deltas(answer.text))
            return answer.json()["choices"][0]["message"]["content"]

        return await asyncio.gather(*(one() for _ in range(count)))


def _until(read, holds, seconds=300):
    deadline = time.monotonic() + seconds
    while not holds(found := read()):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


def test_replicas_without_ray_serve_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with ExitStack() as stack, pytest.raises(ConfigError, match=r"pip install '\.\[ray\]'"):
        start_replicas(Sources(load=lambda: None), 2, limits=ServeLimits(), stack=stack)
