"""Server timeouts: real sockets with limits of a second and less."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest

from easyllm.core.config import validate
from easyllm.core.errors import ConfigError
from easyllm.engine import LLM
from easyllm.serve.limits import ServeLimits
from easyllm.serve.run import bind, build_server
from easyllm.tokenizer.chat import EncodedChat
from raw_http import CHUNKED, answer_on, ask, connected, head_of, slow_down, wait_for
from running_server import running

SHORT = ServeLimits(read_timeout_s=0.6, write_timeout_s=0.6, drain_timeout_s=0.6)
MARGIN_S = 5  # allows for a busy machine


@pytest.fixture
def llm(tiny_model, tiny_tokenizer):
    return LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")


def seconds_until_closed(raw):
    """Returns how long the server takes to close a connection."""
    began = time.monotonic()
    raw.settimeout(SHORT.read_timeout_s + MARGIN_S)
    try:
        while raw.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - began


def dribble(raw, stopped):
    """Sends a byte every tenth of a second."""
    while not stopped.wait(0.1):
        try:
            raw.sendall(b"x")
        except OSError:
            return


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /v1/chat/comp",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
        head_of("Content-Length: 100") + b"{",
        head_of(CHUNKED) + b"500\r\n{",
        head_of("Content-Length: 100", "Expect: 100-continue"),
    ],
    ids=["line", "header", "body", "chunk", "expect"],
)
@pytest.mark.parametrize("dribbling", [False, True], ids=["silent", "dribbling"])
def test_an_incomplete_request_times_out_with_408(llm, sent, dribbling):
    with running({"m": llm}, limits=SHORT) as address, connected(address) as raw:
        raw.sendall(sent)
        stopped = threading.Event()
        if dribbling:
            threading.Thread(target=dribble, args=(raw, stopped), daemon=True).start()
        began = time.monotonic()
        status, text = answer_on(raw)
        stopped.set()
        assert status == 408
        assert SHORT.read_timeout_s * 0.8 < time.monotonic() - began < MARGIN_S
        assert json.loads(text)["error"]["type"] == "invalid_request_error"
        assert seconds_until_closed(raw) < MARGIN_S
        assert httpx.get(f"{address}/health").status_code == 200


def test_a_stalled_body_is_counted_under_the_status_that_was_sent(llm):
    with running({"m": llm}, limits=SHORT) as address, connected(address) as raw:
        raw.sendall(head_of("Content-Length: 100") + b"{")
        assert answer_on(raw)[0] == 408
        counted = [
            line
            for line in httpx.get(f"{address}/metrics").text.splitlines()
            if line.startswith("easyllm_http_requests_total{") and "/v1/" in line
        ]
        assert [line.rpartition("status=")[2] for line in counted] == ['"408"} 1'], counted


def test_an_idle_connection_is_closed(llm):
    with running({"m": llm}, limits=SHORT) as address, connected(address) as raw:
        assert 0.3 < seconds_until_closed(raw) < MARGIN_S


def test_a_body_still_being_sent_after_a_refusal_is_not_read_forever(llm):
    """The 401 response is sent immediately; the rest of the body is not read without limit."""
    with running({"m": llm}, limits=SHORT, api_key="k") as address, connected(address) as raw:
        raw.sendall(head_of("Content-Length: 100") + b"{")
        assert answer_on(raw)[0] == 401
        stopped = threading.Event()
        threading.Thread(target=dribble, args=(raw, stopped), daemon=True).start()
        assert seconds_until_closed(raw) < MARGIN_S
        stopped.set()


def test_the_read_timeout_covers_a_request_not_its_response_or_connection(llm, monkeypatch):
    """The response takes longer than a request may, and a connection carries several requests."""
    slow_down(llm, monkeypatch, 0.05)
    with running({"m": llm}, limits=SHORT) as address, connected(address) as raw:
        for _ in range(2):
            began = time.monotonic()
            ask(raw, max_tokens=20)
            assert answer_on(raw)[0] == 200
            assert time.monotonic() - began > SHORT.read_timeout_s
        host, port = address.removeprefix("http://").split(":")
        pooled = http.client.HTTPConnection(host, int(port), timeout=20)
        for _ in range(4):
            time.sleep(0.3)
            pooled.request("GET", "/health")
            assert pooled.getresponse().read() == b'{"status":"ok"}'
        pooled.close()


@contextmanager
def slow_reader(address):
    """Opens a connection with small buffers, so that unread data accumulates in the server."""
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(20)
        raw.connect((host, int(port)))
        yield raw


MANY_BYTES = {"logprobs": True, "top_logprobs": 20, "n": 8, "stream": True, "seed": 1}


def test_a_client_that_never_reads_its_stream_is_dropped_and_frees_its_request(llm, monkeypatch):
    steps = slow_down(llm, monkeypatch, 0.01)
    with (
        running({"m": llm}, limits=SHORT, send_buffer=4096) as address,
        slow_reader(address) as raw,
    ):
        ask(raw, **MANY_BYTES)
        assert wait_for(lambda: len(steps) > 3)
        assert wait_for(lambda: not llm.engine.busy)
        assert len(steps) < 190
        assert llm.engine.pool.available == llm.engine.pool.num_pages


def test_a_slow_reader_gets_the_complete_response(llm):
    with (
        running({"m": llm}, limits=SHORT, send_buffer=4096) as address,
        slow_reader(address) as raw,
    ):
        ask(raw, **MANY_BYTES, max_tokens=60)
        began, received = time.monotonic(), b""
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += raw.recv(4096)
            time.sleep(0.02)
        assert b"data: [DONE]" in received
        assert time.monotonic() - began > 2 * SHORT.write_timeout_s


# ---- shutdown


@contextmanager
def ended(llm, limits=SHORT, **options):
    """Yields a server's address and a function that shuts it down and returns the time taken."""
    listener = bind("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server = build_server({"m": llm}, limits=limits, **options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert wait_for(lambda: server.started)

    def end():
        began = time.monotonic()
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()
        return time.monotonic() - began

    yield f"http://127.0.0.1:{listener.getsockname()[1]}", end
    server.should_exit = server.force_exit = True
    thread.join(timeout=30)


def test_shutdown_waits_for_requests_that_finish_in_time(llm, monkeypatch):
    steps = slow_down(llm, monkeypatch, 0.02)
    with ended(llm, ServeLimits(drain_timeout_s=20)) as (address, end), connected(address) as raw:
        ask(raw, max_tokens=30)
        assert wait_for(lambda: len(steps) > 1)
        assert end() < 10
        assert answer_on(raw)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_exceed_the_drain_timeout_end_with_an_error(llm, monkeypatch, stream):
    steps = slow_down(llm, monkeypatch, 0.05)
    with ended(llm) as (address, end), connected(address) as raw:
        ask(raw, stream=stream)
        assert wait_for(lambda: len(steps) > 1)
        assert SHORT.drain_timeout_s * 0.8 < end() < MARGIN_S
        status, text = answer_on(raw)
        assert status == (200 if stream else 503)
        error = json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
        assert error["type"] == "server_error"
        assert "the server is shutting down" in error["message"]


def test_requests_still_being_encoded_are_ended_too(llm, monkeypatch):
    released = threading.Event()
    chat = EncodedChat([1, 2], None, "")
    monkeypatch.setattr(llm.tokenizer, "encode_chat", lambda *_, **__: released.wait(20) and chat)
    with ended(llm) as (address, end), connected(address) as raw:
        ask(raw)
        time.sleep(0.2)
        threading.Timer(3.5, released.set).start()  # shutdown waits for the loop's thread pool
        assert end() < 3.5 + MARGIN_S
        status, text = answer_on(raw)
        assert status == 503
        assert json.loads(text)["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /he", head_of("Content-Length: 100") + b"{", head_of(CHUNKED) + b"500\r\n{"],
    ids=["nothing", "line", "body", "chunk"],
)
def test_an_incomplete_request_does_not_delay_shutdown(llm, sent):
    with ended(llm, ServeLimits(drain_timeout_s=60)) as (address, end), connected(address) as raw:
        raw.sendall(sent)
        time.sleep(0.2)
        assert end() < MARGIN_S
        if b"{" in sent:
            assert answer_on(raw)[0] == 503


def test_a_client_that_never_reads_does_not_delay_shutdown(llm, monkeypatch):
    steps = slow_down(llm, monkeypatch, 0.01)
    long = ServeLimits(write_timeout_s=60, drain_timeout_s=0.6)
    with ended(llm, long) as (address, end), slow_reader(address) as raw:
        ask(raw, **MANY_BYTES)
        assert wait_for(lambda: len(steps) > 20)
        assert end() < MARGIN_S


def test_the_command_exits_on_sigterm_regardless_of_clients(tiny_folder):
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    words = ["serve", f"m={tiny_folder}", "--port", str(port)]
    words += ["--read-timeout", "60", "--write-timeout", "60", "--drain-timeout", "60"]
    process = subprocess.Popen(
        [sys.executable, "-m", "easyllm", *words],
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        address = f"http://127.0.0.1:{port}"
        assert wait_for(lambda: reached(address), 60)
        with connected(address) as raw:
            raw.sendall(head_of("Content-Length: 100") + b"{")
            time.sleep(0.2)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)
            assert time.monotonic() - began < MARGIN_S
            assert answer_on(raw)[0] == 503
        assert b"Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def reached(address):
    try:
        return httpx.get(f"{address}/health", timeout=1).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 10**9])
@pytest.mark.parametrize("name", ["read_timeout_s", "write_timeout_s", "drain_timeout_s"])
def test_an_invalid_timeout_is_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        validate(ServeLimits, {name: value}, source="serving options")
