"""Runs an engine in a separate thread; the server's event loop submits requests to it."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable

from easyllm.core.errors import EasyllmError
from easyllm.engine.llm import LLM
from easyllm.engine.request import Request, TokenEvent

logger = logging.getLogger(__name__)


class EngineFailure(RuntimeError):
    """An engine step failed and the request was not at fault; the traceback is in the log."""

    status = 500


class ServerShuttingDown(EngineFailure):
    """The server is shutting down and the drain timeout has expired."""

    status = 503


Deliver = Callable[[TokenEvent | Exception], None]


class EngineService:
    """Runs an engine's steps in a thread; requests may come from any event loop.

    Args:
        name: name of the model, used in the thread's name and in log lines.
        llm: the model and its engine.

    Example:
        async for event in service.generate(request): ...
    """

    def __init__(self, name: str, llm: LLM) -> None:
        self.name, self.llm = name, llm
        self._inbox: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._listeners: dict[int, Deliver] = {}
        self._ended: EngineFailure | None = None
        self._thread = threading.Thread(target=self._work, name=f"engine-{name}", daemon=True)
        self._thread.start()

    async def generate(self, request: Request) -> AsyncIterator[TokenEvent]:
        """Yields the events of one request; leaving the iteration early cancels the request.

        Raises:
            ConfigError: the engine rejects the request.
            EngineFailure: an engine step failed, or `end` was called.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()

        def deliver(event: TokenEvent | Exception) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        self._inbox.put(lambda: self._start(request, deliver))
        unfinished = request.params.n
        try:
            while unfinished:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                unfinished -= event.finish_reason is not None
                yield event
        finally:
            self._inbox.put(lambda: self._forget(request.id, deliver))

    def end(self, error: EngineFailure) -> None:
        """Ends running requests with `error` after the current step and rejects new ones too."""

        def fail() -> None:
            self._ended = error
            self._fail_all(error)

        self._inbox.put(fail)

    def close(self) -> None:
        """Stops the thread after the current step, waiting at most 10 seconds for it."""
        self._inbox.put(None)
        self._thread.join(timeout=10)

    def _work(self) -> None:
        engine = self.llm.engine
        while True:
            while not engine.busy or not self._inbox.empty():
                task = self._inbox.get()
                if task is None:
                    return
                task()
            try:
                events = engine.step()
            except Exception:
                logger.exception("engine %s: a step failed", self.name)
                self._fail_all(
                    EngineFailure("the engine failed on this request; see the server's log")
                )
                continue
            for event in events:
                listener = self._listeners.get(event.request_id)
                if listener is not None:
                    _safely(listener, event)

    def _start(self, request: Request, deliver: Deliver) -> None:
        if self._ended is not None:
            _safely(deliver, self._ended)
            return
        try:
            self.llm.engine.add(request)
        except EasyllmError as error:
            _safely(deliver, error)
            return
        self._listeners[request.id] = deliver

    def _forget(self, request_id: int, deliver: Deliver) -> None:
        """Cancels a request on behalf of its listener.

        A rejected request was never registered here: its id may belong to another listener.
        """
        if self._listeners.get(request_id) is deliver:
            del self._listeners[request_id]
            self.llm.engine.cancel(request_id)

    def _fail_all(self, error: Exception) -> None:
        """Cancels all requests and sends the error to their listeners."""
        listeners, self._listeners = self._listeners, {}
        for request_id, listener in listeners.items():
            self.llm.engine.cancel(request_id)
            _safely(listener, error)


def _safely(deliver: Deliver, event: TokenEvent | Exception) -> None:
    """Delivers to an event loop that may already be closed."""
    try:
        deliver(event)
    except RuntimeError:
        logger.debug("a listener's event loop is closed")
