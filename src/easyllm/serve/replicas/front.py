"""The front of the replicas: forwards each request to one of them, and again if that one dies."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException as RoutingError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from easyllm.core.json_types import JsonObject
from easyllm.serve.endpoint import Endpoint
from easyllm.serve.errors import (
    APIError,
    error_body,
    error_response,
    on_api_error,
    on_exception,
    on_routing_error,
)
from easyllm.serve.exposition import CONTENT_TYPE
from easyllm.serve.guard import Guard
from easyllm.serve.history import History
from easyllm.serve.json_text import JSONResponse
from easyllm.serve.observe import Observe
from easyllm.serve.own_routes import own_endpoints
from easyllm.serve.page import page_endpoints
from easyllm.serve.replicas.board import Report, merged_metrics, merged_view
from easyllm.serve.replicas.replica import ForwardedRequest
from easyllm.serve.request_log import RequestLog
from easyllm.serve.sse import MEDIA_TYPE, sse

logger = logging.getLogger(__name__)
ATTEMPTS = 5
"""How often a request is sent to a replica before the client gets 503."""
_GONE = "the replica that answered has died; send the request again"


class Stream(Protocol):
    """The response of a replica: lists of ASGI messages, which can be cancelled."""

    def __aiter__(self) -> AsyncIterator[list[Message]]: ...

    def cancel(self) -> None:
        """Ends the request in the replica."""


class ReplicaDied(Exception):
    """The replica that answered a request has died, or could not be reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """How the front reaches the replicas.

    Attributes:
        send: sends a request to a replica; the stream raises one of `died` if the replica dies.
        died: exceptions which say that it has died.
        reports: returns the latest reports by replica.
    """

    send: Callable[[ForwardedRequest], Stream]
    died: tuple[type[Exception], ...]
    reports: Callable[[], Awaitable[dict[str, Report]]]


def create_front(
    replicas: Replicas,
    *,
    api_key: str | None = None,
    allowed_hosts: Collection[str] = (),
    log: RequestLog | None = None,
    history: History | None = None,
) -> Starlette:
    """Builds the application of the front; the arguments are those of `create_app`."""

    async def metrics() -> Response:
        text = merged_metrics(await replicas.reports())
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def engines() -> JsonObject:
        return merged_view(await replicas.reports())

    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    own = [
        *page_endpoints(),
        *own_endpoints(engines, history),
        Endpoint(method="GET", path="/health", answer=health),
        Endpoint(method="GET", path="/metrics", answer=metrics),
    ]
    app = Starlette(routes=[each.route() for each in own])
    app.router.redirect_slashes = False
    app.router.default = _Forward(replicas)
    app.add_exception_handler(APIError, on_api_error)
    app.add_exception_handler(RoutingError, on_routing_error)
    app.add_exception_handler(Exception, on_exception)
    app.add_middleware(Guard, api_key=api_key, allowed_hosts=allowed_hosts)
    app.add_middleware(Observe, log=log)
    return app


class _Forward:
    """The ASGI application that forwards requests.

    Args:
        replicas: where they go.
    """

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = Request(scope, receive)
        request = ForwardedRequest(
            method=scope["method"],
            path=scope["path"],
            raw_path=scope.get("raw_path") or scope["path"].encode(),
            query=scope["query_string"],
            headers=tuple(scope["headers"]),
            body=await http.body(),
        )
        work = asyncio.create_task(self._answer(request, scope, receive, send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            for task in (work, gone):
                task.cancel()

    async def _answer(
        self, request: ForwardedRequest, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Sends the response of a replica; of another one if the first dies before it begins."""
        for attempt in range(ATTEMPTS):
            begun: Message | None = None
            stream = self._replicas.send(request)
            try:
                async for messages in stream:
                    for message in messages:
                        begun = begun or message
                        await send(message)
                return
            except self._replicas.died as error:
                logger.warning("a replica died while it answered %s: %s", request.path, error)
                if begun is not None:
                    await _end(begun, send)
                    return
                await asyncio.sleep(0.05 * 2**attempt)
            except asyncio.CancelledError:
                stream.cancel()
                raise
        refusal = error_response(503, "no replica answers; try again later", path=request.path)
        await refusal(scope, receive, send)


async def _end(begun: Message, send: Send) -> None:
    """Ends a response that has begun: a stream of events with an error event, others cut off."""
    types = [value for name, value in begun.get("headers", ()) if name == b"content-type"]
    if not any(MEDIA_TYPE.split(";")[0].encode() in value for value in types):
        raise ReplicaDied(_GONE)
    event = sse(error_body(503, _GONE))
    await send({"type": "http.response.body", "body": event.encode(), "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
