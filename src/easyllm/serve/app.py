"""The HTTP server: OpenAI's chat endpoint, a health check, and the chat page."""

import asyncio
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect

from easyllm.core.errors import ConfigError, EasyllmError
from easyllm.engine.llm import LLM, Completion
from easyllm.engine.request import Logprobs, Request, TokenEvent
from easyllm.serve.errors import APIError, error_body, error_response
from easyllm.serve.guard import Guard
from easyllm.serve.hang_up import unless_gone
from easyllm.serve.schema import ChatRequest
from easyllm.serve.service import EngineFailure, EngineService
from easyllm.tokenizer.stream import REPLACEMENT
from easyllm.tokenizer.tokenizer import Tokenizer

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8420
PAGE = Path(__file__).parent / "web" / "index.html"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}


def create_app(models: Mapping[str, LLM], *, api_key: str | None = None) -> FastAPI:
    """The server's application.

    Args:
        models: what each model is called, and the model.
        api_key: asked of every route but `/health` when set.
    """
    services = {name: EngineService(name, llm) for name, llm in models.items()}
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for service in services.values():
            service.close()

    app = FastAPI(title="Easyllm", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(APIError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_middleware(Guard, api_key=api_key)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(PAGE, headers=_PAGE_HEADERS)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        entries = [
            {"id": name, "object": "model", "created": created, "owned_by": "easyllm"}
            for name in services
        ]
        return {"object": "list", "data": entries}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: HTTPRequest) -> Response:
        if body.model not in services:
            known = ", ".join(services)
            raise APIError(
                404, f"model {body.model!r} is not served; served are {known}", param="model"
            )
        try:
            return await unless_gone(http, _chat(body, services[body.model]))
        except EasyllmError as error:
            raise APIError(400, str(error)) from None
        except EngineFailure as error:
            raise APIError(500, str(error)) from None
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it

    return app


def serve(
    models: Mapping[str, LLM],
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    api_key: str | None = None,
) -> None:
    """Serves until interrupted.

    Raises:
        ConfigError: the port is taken.
    """
    import uvicorn

    listener = bind(host, port)
    config = uvicorn.Config(create_app(models, api_key=api_key), log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])


def bind(host: str, port: int) -> socket.socket:
    """A socket listening on an address, taken before any model is loaded.

    Raises:
        ConfigError: the port is taken or not allowed.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another port with --port"
        ) from None
    return listener


async def _chat(body: ChatRequest, service: EngineService) -> Response:
    """The answer to a request: whole, or a stream whose first event is there, so that a refusal shows before it begins."""
    messages = [message.as_dict() for message in body.messages]
    # in a thread: a long conversation takes seconds, in which other clients want their tokens
    prompt = await asyncio.to_thread(service.llm.encode_chat, messages)
    events = service.generate(Request(prompt_ids=tuple(prompt), params=body.sampling()))
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": body.model,
    }
    if body.stream:
        first = await anext(events)
        usage = body.stream_options is not None and body.stream_options.include_usage
        counted = len(prompt) if usage else None
        stream = _stream(head, first, events, counted, service.llm.tokenizer)
        return StreamingResponse(stream, media_type="text/event-stream")
    completion = Completion()
    async for event in events:
        completion.take(event)
    return _whole(body, head, completion, len(prompt), service.llm.tokenizer)


def _whole(
    body: ChatRequest,
    head: dict[str, Any],
    completion: Completion,
    prompt_tokens: int,
    tokenizer: Tokenizer,
) -> Response:
    """All choices at once, with their usage."""
    completions = [completion, *completion.others]
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": each.text},
            "logprobs": _logprobs(each.details, tokenizer) if body.logprobs else None,
            "finish_reason": each.finish_reason,
        }
        for index, each in enumerate(completions)
    ]
    generated = sum(len(each.token_ids) for each in completions)
    return JSONResponse(
        {
            **head,
            "object": "chat.completion",
            "choices": choices,
            "usage": _usage(prompt_tokens, generated),
        }
    )


async def _stream(
    head: dict[str, Any],
    first: TokenEvent,
    rest: AsyncIterator[TokenEvent],
    prompt_tokens: int | None,
    tokenizer: Tokenizer,
) -> AsyncIterator[str]:
    """Server-sent events; usage at the end where the prompt's tokens are given."""

    def chunk(index: int, delta: dict[str, str], **rest: Any) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": None} | rest
        return _event({**head, "object": "chat.completion.chunk", "choices": [choice]})

    count, begun = 0, set[int]()
    event: TokenEvent | None = first
    while event is not None:
        if event.index not in begun:
            begun.add(event.index)
            yield chunk(event.index, {"role": "assistant", "content": ""})
        count += event.token_id is not None
        details = {}
        if event.logprobs is not None:
            details = {"logprobs": _logprobs([event.logprobs], tokenizer)}
        if event.text or details:
            yield chunk(event.index, {"content": event.text}, **details)
        if event.finish_reason is not None:
            yield chunk(event.index, {}, finish_reason=event.finish_reason)
        try:
            event = await anext(rest, None)
        except EngineFailure as error:
            yield _event(error_body(500, str(error)))
            return
    if prompt_tokens is not None:
        usage = _usage(prompt_tokens, count)
        yield _event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _logprobs(details: Sequence[Logprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """OpenAI's form: raw log-probabilities of the tokens, and of the most likely ones beside each."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.token_text(token_id)
        whole = REPLACEMENT not in text  # a piece of a character has no bytes of its own here
        # -inf is no JSON; the number is OpenAI's for "very unlikely"
        logprob = max(logprob, -9999.0)
        return {"token": text, "bytes": list(text.encode()) if whole else None, "logprob": logprob}

    return {
        "content": [
            entry(place.token_id, place.raw)
            | {"top_logprobs": [entry(*other) for other in place.top_raw]}
            for place in details
        ]
    }


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


async def _on_api_error(_: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error_response(error.status_code, error.detail, param=error.param)


async def _on_invalid(_: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"] if part != "body")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "this field is not supported"
    return error_response(400, f"{place}: {message}" if place else message, param=place or None)
