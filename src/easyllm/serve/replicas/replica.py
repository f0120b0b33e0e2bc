"""One replica: runs the application on requests that arrive as values.

This module does not import Ray; `run` makes a deployment of `Replica`.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import Context
from dataclasses import dataclass
from typing import Protocol

from starlette.types import Message, Scope

from easyllm.core.json_types import JsonObject
from easyllm.engine.llm import LLM
from easyllm.serve.app import create_app
from easyllm.serve.engine_view import engine_view
from easyllm.serve.limits import ServeLimits
from easyllm.serve.models import Loader
from easyllm.serve.responses.store import NoStore

logger = logging.getLogger(__name__)
REPORT_S = 0.5
"""Seconds between two reports of a replica's numbers."""
Report = Callable[[str, JsonObject], Awaitable[None]]


class LoadedModels(Protocol):
    """Models with their adapters and loaders, as `create_app` takes them."""

    @property
    def models(self) -> Mapping[str, LLM]: ...
    @property
    def adapters(self) -> Mapping[str, str]: ...
    @property
    def loaders(self) -> Mapping[str, Loader]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The models of a replica.

    Attributes:
        load: loads them; it is pickled, and called once in the process of each replica.
    """

    load: Callable[[], LoadedModels]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardedRequest:
    """An HTTP request as the front received it, with its whole body."""

    method: str
    path: str
    raw_path: bytes
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def scope(self) -> Scope:
        """Returns the request as an ASGI scope."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "http",
            "root_path": "",
            "client": None,
            "server": None,
            "method": self.method,
            "path": self.path,
            "raw_path": self.raw_path,
            "query_string": self.query,
            "headers": list(self.headers),
            "state": {},
        }


class Replica:
    """The application, in a process of Ray Serve.

    Args:
        sources: the models.
        limits: bounds on waiting requests, each replica's own.
        report: receives the replica's metrics and its engine view, twice a second.
    """

    def __init__(self, sources: Sources, limits: ServeLimits, report: Report) -> None:
        loaded = sources.load()
        # the front has checked the key and the host
        self._app = create_app(
            loaded.models,
            adapters=loaded.adapters,
            loaders=loaded.loaders,
            limits=limits,
            allowed_hosts=("*",),
            responses=NoStore("by a server with --replicas"),
        )
        self._report, self._tasks = report, list[asyncio.Task[None]]()

    async def answer(self, request: ForwardedRequest) -> AsyncIterator[list[Message]]:
        """Yields the messages of the response, in lists of those that are ready.

        If the caller stops listening, the request is cancelled.
        """
        self._begin()
        ready: asyncio.Queue[Message | None] = asyncio.Queue()
        body = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> Message:
            if body:
                return body.pop()
            await asyncio.Event().wait()  # the caller cancels the task when the client is gone
            raise AssertionError("never set")

        async def run() -> None:
            try:
                await self._app(request.scope(), receive, ready.put)
            finally:
                await ready.put(None)

        task = asyncio.create_task(run())
        try:
            while (first := await ready.get()) is not None:
                messages: list[Message | None] = [first]
                while not ready.empty():
                    messages.append(ready.get_nowait())
                yield [message for message in messages if message is not None]
                if messages[-1] is None:
                    break
            await task
        finally:
            task.cancel()

    def _begin(self) -> None:
        """Starts what runs along with the requests; not before there is an event loop."""
        if not self._tasks:
            # in a context of its own: what Ray keeps in the context of the first request, such as
            # the calls that end with it, does not concern the reports
            task = asyncio.create_task(self._report_numbers(), context=Context())
            self._tasks.append(task)

    async def _report_numbers(self) -> None:
        """Sends a report twice a second; one that fails is logged, and the next one is sent."""
        state = self._app.state
        while True:
            try:
                view = await engine_view(state.models, state.metrics)
                await self._report(state.metrics.render(), view)
            except Exception:
                logger.exception("a report of this replica's numbers could not be sent")
            await asyncio.sleep(REPORT_S)
