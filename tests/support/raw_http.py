"""HTTP on plain sockets: parts of requests, and answers read from them."""

import http.client
import json
import socket
import time
from contextlib import contextmanager

from running_server import QUESTION


@contextmanager
def connected(address):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        yield raw


def head_of(*lines):
    first = (
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
    )
    return ("\r\n".join((*first, *lines)) + "\r\n\r\n").encode()


def ask(raw, **changes):
    """Sends a request for 200 tokens without reading the response."""
    fields = {"model": "m", "messages": QUESTION, "max_tokens": 200, "logit_bias": {"2": -100}}
    body = json.dumps(fields | changes).encode()
    raw.sendall(head_of(f"Content-Length: {len(body)}") + body)


def answer_on(raw):
    """Returns the status code and the body."""
    answer = http.client.HTTPResponse(raw)
    answer.begin()
    return answer.status, answer.read().decode()


def slow_down(llm, monkeypatch, seconds=0.03):
    """Makes each step take at least `seconds`; returns a list that grows by one per step."""
    runner, steps = llm.engine.runner, []
    run = runner.run

    def slowly(step):
        steps.append(step)
        time.sleep(seconds)
        return run(step)

    monkeypatch.setattr(runner, "run", slowly)
    return steps


def wait_for(condition, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


CHUNKED = "Transfer-Encoding: chunked"
