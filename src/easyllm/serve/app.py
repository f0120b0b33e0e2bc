"""The HTTP application: OpenAI's chat endpoint, a health check, and the chat page."""

import asyncio
import errno
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import uvicorn
from fastapi import FastAPI, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException as RoutingError
from starlette.requests import ClientDisconnect

from easyllm.core.errors import ConfigError, ContextLengthError, DataError, EasyllmError
from easyllm.engine.llm import LLM
from easyllm.serve.openai.chat_answers import Health, ModelEntry, ModelList
from easyllm.serve.body import parse_object, read_body
from easyllm.serve.openai.chat import answer_chat
from easyllm.serve.connection import KEEP_ALIVE_S, BoundedProtocol, BoundedServer
from easyllm.serve.documented import CHAT_BODY, chat_answers, document, errors
from easyllm.serve.errors import APIError, on_api_error, on_exception, on_routing_error
from easyllm.serve.guard import Guard, check_key
from easyllm.serve.hang_up import cancel_on_disconnect
from easyllm.serve.limits import ServeLimits
from easyllm.serve.openai.chat_request import ChatRequest, read_chat
from easyllm.serve.service import EngineFailure, EngineService, ServerShuttingDown

T = TypeVar("T")
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8420
PAGE = Path(__file__).parent / "web" / "index.html"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; object-src 'none'",
}


def create_app(
    models: Mapping[str, LLM],
    *,
    api_key: str | None = None,
    adapters: Mapping[str, str] | None = None,
) -> FastAPI:
    """Builds the server's ASGI application; `state.services` contains the models' engine services.

    Args:
        models: the served models by name. Several names may share one model.
        api_key: if set, required by every route except `/health` and the chat page.
        adapters: for a served name, the adapter of its model that its requests select; without an
            entry, the base model answers.

    Raises:
        ConfigError: the key cannot be sent in a header.
    """
    check_key(api_key)
    with_key = api_key is not None
    # An engine runs in a single thread, regardless of how many names it is served under.
    engines = {id(llm): EngineService(name, llm) for name, llm in models.items()}
    services = {name: engines[id(llm)] for name, llm in models.items()}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for service in engines.values():
            service.close()

    app = FastAPI(
        title="Easyllm", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.services = list(engines.values())
    app.add_exception_handler(APIError, on_api_error)
    app.add_exception_handler(RoutingError, on_routing_error)
    app.add_exception_handler(Exception, on_exception)
    app.add_middleware(Guard, api_key=api_key)
    document(app, list(models), with_key=with_key)

    @app.get("/health", responses=errors(with_key=False))
    async def health() -> Health:
        return Health()

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE, headers=_PAGE_HEADERS)

    _add_model_routes(app, models, with_key=with_key)

    @app.post(
        "/v1/chat/completions",
        response_model=None,
        responses=chat_answers(with_key=with_key),
        openapi_extra=CHAT_BODY,
    )
    async def chat(http: HTTPRequest) -> Response:
        return await _chat(http, services, adapters)

    return app


def _add_model_routes(app: FastAPI, models: Mapping[str, LLM], *, with_key: bool) -> None:
    """Adds the routes that list the served models."""
    created = int(time.time())
    entries = {
        name: ModelEntry(id=name, created=created, max_model_len=_most_tokens(llm))
        for name, llm in models.items()
    }

    @app.get("/v1/models", responses=errors(with_key=with_key))
    async def list_models() -> ModelList:
        return ModelList(data=list(entries.values()))

    @app.get("/v1/models/{model_id:path}", responses=errors(404, with_key=with_key))
    async def one_model(model_id: str) -> ModelEntry:
        return _served(entries, model_id)


async def _chat(
    http: HTTPRequest,
    services: Mapping[str, EngineService],
    adapters: Mapping[str, str] | None,
) -> Response:
    """Returns the response to a chat request.

    Args:
        http: the request.
        services: the engines by served name.
        adapters: names of adapters, by the served names that select them.

    Raises:
        APIError: the request is invalid, or the engine failed.
    """
    try:
        raw = await read_body(http)
        # Parsed in a thread, so that a large body does not delay other clients' tokens.
        request = await asyncio.to_thread(_read, raw)
        service = _served(services, request.model)
        answer = answer_chat(request, service, adapter=(adapters or {}).get(request.model, ""))
        return await cancel_on_disconnect(http, answer)
    except ContextLengthError as error:
        message = f"{error.what}; shorten the messages, or lower max_tokens"
        raise APIError(400, message, param="messages", code="context_length_exceeded") from None
    except DataError as error:  # raised by the chat template
        raise APIError(400, str(error), param="messages") from None
    except EasyllmError as error:
        raise APIError(400, str(error), param=error.param) from None
    except EngineFailure as error:
        raise APIError(error.status, str(error)) from None
    except ClientDisconnect:
        return Response(status_code=499)  # the client is gone and never reads this


def _served(models: Mapping[str, T], name: str) -> T:
    """Returns what belongs to a served model.

    Raises:
        APIError: no model has this name.
    """
    if name in models:
        return models[name]
    message = f"model {name!r} is not served; the served models are {', '.join(models)}"
    raise APIError(404, message, param="model", code="model_not_found")


def serve(
    models: Mapping[str, LLM],
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    api_key: str | None = None,
    limits: ServeLimits | None = None,
    adapters: Mapping[str, str] | None = None,
) -> None:
    """Serves the models until interrupted.

    Args:
        models: the served models by name.
        host: address to listen on.
        port: port to listen on.
        api_key: if set, required by every route except `/health` and the chat page.
        limits: timeouts for reading, writing and draining; by default `ServeLimits()`.
        adapters: as for `create_app`.

    Raises:
        ConfigError: the port is in use, or the key cannot be sent in a header.
    """
    listener = bind(host, port)
    server = build_server(models, api_key=api_key, limits=limits, adapters=adapters)
    server.run(sockets=[listener])


def build_server(
    models: Mapping[str, LLM],
    *,
    api_key: str | None = None,
    limits: ServeLimits | None = None,
    adapters: Mapping[str, str] | None = None,
) -> BoundedServer:
    """Builds a server for the models that enforces the timeouts in `limits`.

    Raises:
        ConfigError: the key cannot be sent in a header.
    """
    limits = limits or ServeLimits()
    app = create_app(models, api_key=api_key, adapters=adapters)
    protocol = type("_Protocol", (BoundedProtocol,), {"limits": limits})
    config = uvicorn.Config(
        app, http=protocol, ws="none", timeout_keep_alive=KEEP_ALIVE_S, log_level="warning"
    )

    def end_requests() -> None:
        for service in app.state.services:
            service.end(ServerShuttingDown("the server is shutting down; try again later"))

    return BoundedServer(config, limits=limits, end_requests=end_requests)


def bind(host: str, port: int) -> socket.socket:
    """Returns a listening socket, so that a port conflict shows before any model is loaded.

    Raises:
        ConfigError: the port is in use or not allowed, or the host is not this machine.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except (OSError, UnicodeError) as error:
        listener.close()
        not_a_host = isinstance(error, UnicodeError | socket.gaierror)
        if not_a_host or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"cannot listen on host {host!r}, which is not an address of this machine; choose "
                "another with --host, such as 127.0.0.1, or 0.0.0.0 for all"
            ) from None
        reason = getattr(error, "strerror", error)
        raise ConfigError(
            f"cannot listen on {host}:{port} ({reason}); choose another port with --port"
        ) from None
    return listener


def _read(raw: bytes) -> ChatRequest:
    return read_chat(parse_object(raw))


def _most_tokens(llm: LLM) -> int:
    """Returns the maximum number of tokens of a prompt plus its completion.

    Bounded by the model's context and by the KV cache. The final token is never cached, hence + 1.
    """
    pool = llm.engine.pool
    return min(llm.engine.max_seq_len, pool.num_pages * pool.page_size + 1)
