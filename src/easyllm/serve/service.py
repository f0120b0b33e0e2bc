"""Runs an engine in a separate thread; the server's event loop submits requests to it.

The two threads share one interpreter lock, so the engine waits whenever the event loop runs Python.
A step therefore wakes each event loop once, with the events of all its requests, and not once per
event.
"""

import asyncio
import concurrent.futures
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TypeVar

from easyllm.core.errors import EasyllmError
from easyllm.engine.llm import LLM
from easyllm.engine.request import Request, TokenEvent
from easyllm.serve.metrics import Metrics, RequestWatch
from easyllm.serve.trace import RequestTrace

T = TypeVar("T")
logger = logging.getLogger(__name__)


class EngineFailure(RuntimeError):
    """An engine step failed and the request was not at fault; the traceback is in the log."""

    status = 500


class AdapterUnloaded(EngineFailure):
    """The adapter of a running request was unloaded."""

    status = 503


class ServerShuttingDown(EngineFailure):
    """The server is shutting down and the drain timeout has expired."""

    status = 503


class EngineService:
    """Runs an engine's steps in a thread; requests may come from any event loop.

    Args:
        name: name of the model, used in the thread's name, in metrics and in log lines.
        llm: the model and its engine.
        metrics: where tokens and times are recorded.

    Example:
        async for event in service.generate(request): ...
    """

    def __init__(self, name: str, llm: LLM, metrics: Metrics | None = None) -> None:
        self.name, self.llm = name, llm
        self._metrics = metrics or Metrics()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[int, _Listener] = {}
        self._arriving: set[int] = set()  # requests that are still in the inbox
        self._queued: dict[int, RequestWatch] = {}  # requests that have not been computed yet
        self._ended: EngineFailure | None = None
        self._closed = False
        self._metrics.add_engine(name, llm.engine, undelivered=lambda: len(self._arriving))
        self._thread = threading.Thread(target=self._work, name=f"engine-{name}", daemon=True)
        self._thread.start()

    async def generate(
        self, request: Request, trace: RequestTrace | None = None
    ) -> AsyncIterator[TokenEvent]:
        """Yields the events of one request; leaving the iteration early cancels the request.

        Args:
            request: the request.
            trace: of its HTTP request; it names the model for the metrics, and records tokens.

        Raises:
            ConfigError: the engine rejects the request.
            EngineFailure: an engine step failed, or `end` was called.
        """
        async for events in self.batches(request, trace):
            for event in events:
                yield event

    async def batches(
        self, request: Request, trace: RequestTrace | None = None
    ) -> AsyncIterator[list[TokenEvent]]:
        """Yields the same events in lists, each of those that are ready.

        A list has the events of one step, and of several if the reader is slower than the engine.
        """
        model = trace.model if trace is not None else ""
        watch = self._metrics.watch(model or self.name, request, trace)
        listener = _Listener(asyncio.get_running_loop(), watch)
        self._arriving.add(request.id)
        self._inbox.put(lambda: self._start(request, listener))
        unfinished = request.params.n
        try:
            self._check_open()
            while unfinished:
                events = await listener.next()
                unfinished -= sum(event.finish_reason is not None for event in events)
                yield events
        finally:
            self._inbox.put(lambda: self._forget(request.id, listener))

    async def call(self, work: Callable[[], T]) -> T:
        """Runs `work` in the engine's thread, between two steps, and returns its result.

        Raises:
            EngineFailure: `end` was called.
            Exception: what `work` raises.
        """
        found: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            if not found.set_running_or_notify_cancel():
                return  # the caller is gone
            try:
                if self._ended is not None:
                    raise self._ended
                found.set_result(work())
            except BaseException as error:
                found.set_exception(error)

        self._inbox.put(run)
        self._check_open()
        return await asyncio.wrap_future(found)

    @property
    def num_waiting(self) -> int:
        """Number of requests that do not run yet."""
        return len(self._arriving) + len(self.llm.engine.scheduler.waiting)

    def end(self, error: EngineFailure) -> None:
        """Ends running requests with `error` after the current step and rejects new ones too."""

        def fail() -> None:
            self._ended = error
            self._fail_all(error)

        self._inbox.put(fail)

    @property
    def num_active(self) -> int:
        """Number of requests that wait or run."""
        return len(self._arriving) + len(self._listeners)

    def _check_open(self) -> None:
        """Refuses a task that came after the thread had stopped."""
        if self._closed:
            raise ServerShuttingDown("the model has been unloaded; try again")

    def close(self) -> None:
        """Stops the thread after the current step, waiting at most 10 seconds for it.

        Running requests end with an error.
        """
        self.end(ServerShuttingDown("the model has been unloaded; try again"))
        self._inbox.put(None)
        self._thread.join(timeout=10)
        self._metrics.remove_engine(self.name)

    def _work(self) -> None:
        engine = self.llm.engine
        while True:
            while not engine.busy or not self._inbox.empty():
                task = self._inbox.get()
                if task is None:
                    self._closed = True
                    while not self._inbox.empty():  # tasks that came while it closed
                        if (late := self._inbox.get()) is not None:
                            late()
                    return
                task()
            begin_s = time.monotonic()
            try:
                events = engine.step()
            except Exception:
                logger.exception("engine %s: a step failed", self.name)
                self._fail_all(
                    EngineFailure("the engine failed on this request; see the server's log")
                )
                continue
            self._record_starts(begin_s)
            self._deliver(events)

    def _record_starts(self, now_s: float) -> None:
        """Records the queue times of the requests that the last step has begun to compute."""
        for request_id, watch in list(self._queued.items()):
            if self.llm.engine.has_started(request_id):
                del self._queued[request_id]
                watch.started(now_s)

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        """Records a step's events and sends them, waking each event loop once."""
        now_s, by_request = time.monotonic(), dict[int, list[TokenEvent]]()
        for event in events:
            by_request.setdefault(event.request_id, []).append(event)
        by_loop: dict[asyncio.AbstractEventLoop, list[_Delivery]] = {}
        for request_id, found in by_request.items():
            listener = self._listeners.get(request_id)
            if listener is not None:
                listener.watch.take(found, now_s)
                by_loop.setdefault(listener.loop, []).append((listener, found))
        for loop, deliveries in by_loop.items():
            _call(loop, deliveries)

    def _start(self, request: Request, listener: "_Listener") -> None:
        self._arriving.discard(request.id)
        if self._ended is not None:
            _call(listener.loop, [(listener, [self._ended])])
            return
        try:
            self.llm.engine.add(request)
        except EasyllmError as error:
            _call(listener.loop, [(listener, [error])])
            return
        self._listeners[request.id] = listener
        self._queued[request.id] = listener.watch

    def _forget(self, request_id: int, listener: "_Listener") -> None:
        """Cancels a request on behalf of its listener.

        A rejected request was never registered here: its id may belong to another listener.
        """
        if self._listeners.get(request_id) is listener:
            del self._listeners[request_id]
            self._queued.pop(request_id, None)
            self.llm.engine.cancel(request_id)
            listener.watch.abandoned("abort")

    def _fail_all(self, error: Exception) -> None:
        """Cancels all requests and sends the error to their listeners."""
        listeners, self._listeners, self._queued = self._listeners, {}, {}
        for request_id, listener in listeners.items():
            self.llm.engine.cancel(request_id)
            listener.watch.abandoned("error")
            _call(listener.loop, [(listener, [error])])


class _Listener:
    """The events of a request on their way from the engine's thread to a coroutine.

    Args:
        loop: the event loop of the coroutine; all methods are called in its thread.
        watch: records the request; used in the engine's thread.
    """

    __slots__ = ("_ready", "_waiter", "loop", "watch")

    def __init__(self, loop: asyncio.AbstractEventLoop, watch: RequestWatch) -> None:
        self.loop, self.watch = loop, watch
        self._ready: list[TokenEvent | Exception] = []
        self._waiter: asyncio.Future[None] | None = None

    def push(self, items: Iterable[TokenEvent | Exception]) -> None:
        """Adds events, or an error after which there are none."""
        self._ready.extend(items)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> list[TokenEvent]:
        """Waits for events and returns all that are ready.

        Raises:
            Exception: the error that was sent, once the events before it have been returned.
        """
        if not self._ready:
            self._waiter = self.loop.create_future()
            await self._waiter
        events = [item for item in self._ready if isinstance(item, TokenEvent)]
        errors = [item for item in self._ready if isinstance(item, Exception)]
        self._ready = list(errors)
        if errors and not events:
            raise errors[0]
        return events


_Delivery = tuple[_Listener, Sequence[TokenEvent | Exception]]


def _call(loop: asyncio.AbstractEventLoop, deliveries: Sequence[_Delivery]) -> None:
    """Sends events to an event loop that may already be closed."""
    try:
        loop.call_soon_threadsafe(_push_all, deliveries)
    except RuntimeError:
        logger.debug("a listener's event loop is closed")


def _push_all(deliveries: Sequence[_Delivery]) -> None:
    for listener, items in deliveries:
        listener.push(items)
