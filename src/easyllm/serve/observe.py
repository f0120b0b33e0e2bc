"""Middleware that records every HTTP request for the metrics and the request log."""

import time
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from easyllm.serve.metrics import Metrics
from easyllm.serve.request_log import RequestLog
from easyllm.serve.trace import TRACE, RequestTrace

if TYPE_CHECKING:
    from starlette.requests import Request

OTHER = "other"
"""Route of requests that belong to none, so that clients cannot create new label values."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def trace_of(request: "Request") -> RequestTrace:
    """Returns the trace of a request that passed through `Observe`."""
    found: RequestTrace = request.scope[TRACE]
    return found


class Observe:
    """Records requests; it must be the outermost middleware, to see those that others refuse.

    Args:
        app: the wrapped ASGI application.
        metrics: counts the responses.
        log: writes a line for each request; None writes none.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics | None = None, log: RequestLog | None = None
    ) -> None:
        self.app, self._metrics, self._log = app, metrics or Metrics(), log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trace = RequestTrace(method=scope["method"], path=scope["path"])
        scope[TRACE] = trace
        complete = False

        async def watched_receive() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not complete:
                trace.client_gone = True
            return message

        async def watched_send(message: Message) -> None:
            nonlocal complete
            if message["type"] == "http.response.start":
                trace.status = trace.status or message["status"]  # unless the connection sent one
            elif not message.get("more_body", False):
                complete = True
            await send(message)

        try:
            await self.app(scope, watched_receive, watched_send)
        finally:
            trace.ended_s = time.monotonic()
            trace.route = _route(scope)
            trace.method = trace.method if trace.method in METHODS else OTHER
            self._metrics.responded(trace)
            if self._log is not None:
                self._log.write(trace)


def _route(scope: Scope) -> str:
    """Returns the path of the route that handled a request."""
    path = getattr(scope.get("route"), "path", None)
    if isinstance(path, str):
        return path
    routes = getattr(scope.get("app"), "routes", ())  # HEAD has a scope of its own below `Guard`
    known = (getattr(route, "path", None) for route in routes)
    return scope["path"] if scope["path"] in known else OTHER
