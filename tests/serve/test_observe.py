"""The middleware that records requests."""

import asyncio
import json
import logging

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from easyllm.serve.guard import Guard
from easyllm.serve.metrics import Metrics
from easyllm.serve.observe import Observe, trace_of
from easyllm.serve.request_log import RequestLog


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def app(metrics):
    app = FastAPI()
    app.add_middleware(Guard, api_key="secret")
    app.add_middleware(Observe, metrics=metrics, log=RequestLog(json_lines=True))

    @app.get("/health")
    async def health(request: Request):
        trace_of(request).model = "m"
        return {}

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str):
        return {"id": model_id}

    @app.get("/fails")
    async def fails():
        raise RuntimeError("a bug")

    @app.get("/endless")
    async def endless():
        async def chunks():
            while True:
                yield "data: x\n\n"
                await asyncio.sleep(0.001)

        return StreamingResponse(chunks())

    return app


@pytest.fixture
def ask(app, caplog):
    """Sends a request; returns the status that the client sees and the logged line."""
    caplog.set_level(logging.INFO, logger="easyllm.requests")

    def send(method, path, key="secret"):
        async def run():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                return await client.request(method, path, headers={"x-api-key": key})

        caplog.clear()
        answer = asyncio.run(run())
        (record,) = (each for each in caplog.records if each.name == "easyllm.requests")
        return answer.status_code, json.loads(record.getMessage())

    return send


def counted(metrics):
    lines = (line for line in metrics.render().splitlines() if line.startswith("easyllm_http"))
    return {line.partition("{")[2].rpartition("}")[0] for line in lines}


def test_a_request_is_logged_and_counted_under_its_route(ask, metrics):
    status, line = ask("GET", "/v1/models/a/b?api_key=hidden")
    assert (status, line["status"]) == (200, 200)
    assert (line["path"], line["route"]) == ("/v1/models/a/b", "/v1/models/{model_id:path}")
    assert line["total_s"] >= 0
    assert counted(metrics) == {
        'method="GET",route="/v1/models/{model_id:path}",status="200"',
    }


def test_a_route_can_name_the_model(ask):
    assert ask("GET", "/health")[1]["model"] == "m"


@pytest.mark.parametrize(
    ("method", "path", "key", "status", "route"),
    [
        ("GET", "/nothing/here", "secret", 404, "other"),
        ("GET", "/v1/models/m", "wrong", 401, "other"),
        ("POST", "/health", "secret", 405, "/health"),
        ("HEAD", "/health", "secret", 200, "/health"),
        ("GET", "/fails", "secret", 500, "/fails"),
    ],
)
def test_every_request_is_seen(ask, metrics, method, path, key, status, route):
    answer, line = ask(method, path, key)
    assert answer == line["status"] == status
    assert line["route"] == route
    assert counted(metrics) == {f'method="{method}",route="{route}",status="{status}"'}


def test_clients_cannot_create_label_values(ask, metrics):
    for number in range(3):
        ask(f"ODD{number}", f"/{number}")
    assert counted(metrics) == {'method="other",route="other",status="404"'}


def test_a_client_that_disconnects_is_noted(app, caplog):
    caplog.set_level(logging.INFO, logger="easyllm.requests")
    sent = []

    async def run():
        left = asyncio.Event()

        async def send(message):
            sent.append(message)
            left.set()

        messages = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/endless",
            "query_string": b"",
            "headers": [(b"x-api-key", b"secret")],
            "asgi": {"spec_version": "2.3"},
        }
        await asyncio.wait_for(app(scope, receive, send), 5)

    asyncio.run(run())
    line = json.loads(caplog.records[-1].getMessage())
    assert (line["status"], line["client_gone"]) == (200, True)
    assert sent
    assert "secret" not in caplog.text
