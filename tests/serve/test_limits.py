"""The server with clients that disconnect, send too much, or send expensive requests."""

import asyncio
import json
import threading

import httpx
import pytest

from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, Request, SamplingParams
from easyllm.serve import generate
from easyllm.serve.guard import MAX_BODY_BYTES
from easyllm.serve.service import EngineService
from raw_http import CHUNKED, answer_on, ask, connected, head_of, slow_down, wait_for
from running_server import QUESTION, running


@pytest.fixture
def llm(tiny_model, tiny_tokenizer):
    """A model that serves one request at a time, so that others wait for their first token."""
    return LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="", max_running=1)


def test_a_client_that_disconnects_without_a_stream_frees_its_request(llm, monkeypatch):
    steps = slow_down(llm, monkeypatch)
    with running({"m": llm}) as address:
        with connected(address) as raw:
            ask(raw)
            assert wait_for(lambda: len(steps) > 2)
        assert wait_for(lambda: not llm.engine.busy)
        assert len(steps) < 100  # of 200
        assert llm.engine.pool.available == llm.engine.pool.num_pages


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_while_queued_leaves_the_queue(llm, monkeypatch, stream):
    steps, scheduler = slow_down(llm, monkeypatch), llm.engine.scheduler
    with running({"m": llm}) as address, connected(address) as first:
        ask(first)
        assert wait_for(lambda: steps)
        with connected(address) as second:
            ask(second, stream=stream)
            assert wait_for(lambda: len(scheduler.waiting) == 1)
        assert wait_for(lambda: not scheduler.waiting)
        assert len(scheduler.running) == 1  # the first request continues
        assert len(steps) < 100


def test_a_chunked_body_is_counted_and_refused_if_too_large(llm):
    with running({"m": llm}) as address:
        chunk = b"10000\r\n" + b"y" * 65536 + b"\r\n"
        with connected(address) as raw:
            raw.sendall(head_of(CHUNKED))
            for _ in range(MAX_BODY_BYTES // 65536 + 1):
                raw.sendall(chunk)
            status, text = answer_on(raw)
        assert status == 413
        assert "invalid_request_error" in text
        with connected(address) as raw:
            raw.sendall(head_of("Content-Length: 5", CHUNKED))
            status, text = answer_on(raw)
        assert status == 400
        assert "send one of them" in text


def test_a_small_chunked_body_is_accepted(llm):
    body = json.dumps({"model": "m", "messages": QUESTION, "max_tokens": 2}).encode()
    with running({"m": llm}) as address:
        answer = httpx.post(
            f"{address}/v1/chat/completions",
            content=iter([body[:20], body[20:]]),
            headers={"content-type": "application/json"},
        )
    assert "content-length" not in answer.request.headers
    assert answer.status_code == 200


def test_other_clients_are_served_while_a_long_conversation_is_encoded(llm, monkeypatch):
    begun, go_on, encode = threading.Event(), threading.Event(), generate.encode

    def slowly(*arguments):
        begun.set()
        assert go_on.wait(20)
        return encode(*arguments)

    monkeypatch.setattr(generate, "encode", slowly)
    with running({"m": llm}) as address, connected(address) as raw:
        ask(raw, max_tokens=1)
        assert begun.wait(10)
        try:
            assert httpx.get(f"{address}/health", timeout=5).status_code == 200
        finally:
            go_on.set()
        assert answer_on(raw)[0] == 200


def test_a_text_that_cannot_fit_is_refused_without_encoding_it(llm, monkeypatch):
    most = 256 * llm.tokenizer.longest_token
    monkeypatch.setattr(type(llm.tokenizer), "encode", lambda *_, **__: pytest.fail("encoded"))
    body = {"model": "m", "messages": [{"role": "user", "content": "y" * most}]}
    with running({"m": llm}) as address:
        answer = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert f"the model's context fits at most {most}; shorten the messages" in answer.text


def test_a_text_of_the_longest_tokens_fits(tiny_tokenizer):
    words = (token for token in tiny_tokenizer.backend.get_vocab() if token.isalpha())
    longest = max(filter(str.isascii, words), key=len)
    text = longest * 50
    ids = tiny_tokenizer.encode_chat(
        [{"role": "user", "content": text}], add_generation_prompt=True, max_tokens=256
    ).token_ids
    assert len(ids) < 70


def test_refusing_a_request_already_being_served_does_not_end_it(llm, monkeypatch):
    slow_down(llm, monkeypatch, 0.01)
    service = EngineService("m", llm)
    request = Request(
        prompt_ids=(5, 6),
        params=SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
    )

    async def both():
        first = service.generate(request)
        events = [await anext(first)]
        with pytest.raises(ConfigError, match="is being served already"):
            await anext(service.generate(request))
        events += [event async for event in first]
        return events

    try:
        events = asyncio.run(asyncio.wait_for(both(), 20))
    finally:
        service.close()
    assert len(events) == 20
