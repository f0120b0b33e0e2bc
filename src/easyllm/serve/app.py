"""The HTTP server: OpenAI's chat endpoint, a health check, and the chat page."""

import hmac
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from easyllm.core.errors import ConfigError, EasyllmError
from easyllm.engine.llm import LLM, Completion
from easyllm.engine.request import Logprobs, TokenEvent
from easyllm.engine.request import Request as EngineRequest
from easyllm.serve.schema import ChatRequest
from easyllm.serve.service import EngineFailure, EngineService
from easyllm.tokenizer.stream import REPLACEMENT
from easyllm.tokenizer.tokenizer import Tokenizer

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8420
MAX_BODY_BYTES = 8 * 2**20
PAGE = Path(__file__).parent / "web" / "index.html"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}


class APIError(Exception):
    """An answer in OpenAI's error form."""

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


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
    app.middleware("http")(_guard(api_key))

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
    async def chat(body: ChatRequest) -> Response:
        if body.model not in services:
            known = ", ".join(services)
            raise APIError(
                404, f"model {body.model!r} is not served; served are {known}", param="model"
            )
        service = services[body.model]
        try:
            prompt = service.llm.encode_chat([message.as_dict() for message in body.messages])
            request = EngineRequest(prompt_ids=tuple(prompt), params=body.sampling())
            events = service.generate(request)
            first = await anext(events)  # a refusal shows before the answer begins
        except EasyllmError as error:
            raise APIError(400, str(error)) from None
        except EngineFailure as error:
            raise APIError(500, str(error)) from None
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
        }
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            counted = len(prompt) if usage else None
            stream = _stream(head, first, events, counted, service.llm.tokenizer)
            return StreamingResponse(stream, media_type="text/event-stream")
        completion = Completion()
        completion.take(first)
        try:
            async for event in events:
                completion.take(event)
        except EngineFailure as error:
            raise APIError(500, str(error)) from None
        completions = [completion, *completion.others]
        tokenizer = service.llm.tokenizer
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": each.text},
                "logprobs": _logprobs(each.details, tokenizer) if body.logprobs else None,
                "finish_reason": each.finish_reason,
            }
            for index, each in enumerate(completions)
        ]
        answer = {
            **head,
            "object": "chat.completion",
            "choices": choices,
            "usage": _usage(len(prompt), sum(len(each.token_ids) for each in completions)),
        }
        return JSONResponse(answer)

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
            yield _event(_error_body(500, str(error)))
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


def _guard(
    api_key: str | None,
) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
    """Checks the key and the size of the body before anything is read."""

    async def guard(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        public = request.url.path in (
            "/health",
            "/",
        )  # the page holds no secret and asks for the key
        if api_key is not None and not public:
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
                return _error(
                    401, "the API key is missing or wrong; send Authorization: Bearer KEY"
                )
        size = request.headers.get("content-length", "0")
        if not size.isdigit() or int(size) > MAX_BODY_BYTES:
            return _error(413, f"the request is larger than {MAX_BODY_BYTES} bytes; send less")
        if request.method == "POST" and "content-length" not in request.headers:
            return _error(411, "the request has no Content-Length; send one")
        return await call_next(request)

    return guard


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return _error(error.status, str(error), param=error.param)


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"] if part != "body")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "this field is not supported"
    return _error(400, f"{place}: {message}" if place else message, param=place or None)


def _error(status: int, message: str, *, param: str | None = None) -> JSONResponse:
    return JSONResponse(_error_body(status, message, param), status_code=status)


def _error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
