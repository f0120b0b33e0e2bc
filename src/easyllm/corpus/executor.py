"""Executors that run the stages of a corpus build: local processes, or Ray on a node or a cluster.

A stage is a function of one work item that writes its output atomically and returns a small value.
Executors differ only in where they call it, not in the result: local processes pickle items and
results, Ray gets them as JSON (corpus/codec). On a cluster the output folder must be on storage
that is shared by all nodes.
"""

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from types import TracebackType
from typing import Generic, Literal, Protocol, Self, TypedDict, TypeVar

from easyllm.core import errors
from easyllm.core.errors import ConfigError, EasyllmError, install
from easyllm.corpus.codec import decode, encode

Engine = Literal["local", "ray"]
AHEAD = 2
"""Number of items submitted beyond one per process, so that no process is idle."""
Item = TypeVar("Item")
Result = TypeVar("Result")
AnyResult_co = TypeVar("AnyResult_co", covariant=True)


class Work(Protocol[Item, AnyResult_co]):
    """A function of one item that can be pickled, with the classes of its items and results."""

    @property
    def item_type(self) -> type[Item]:
        """The class of the items."""
        ...

    @property
    def result_type(self) -> type[AnyResult_co]:
        """The class of the results."""
        ...

    def __call__(self, item: Item) -> AnyResult_co:
        """Does the work of one item."""
        ...


class Executor(Protocol):
    """Calls a function on every item; as a context manager, it ends its processes on exit."""

    def map(self, work: Work[Item, Result], items: Sequence[Item]) -> Iterator[Result]:
        """Yields the results of `work` in the order of the items."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def build_executor(engine: Engine, workers: int | None = None) -> Executor:
    """Returns the executor that a recipe names.

    Args:
        engine: `local` or `ray`.
        workers: number of processes; by default one per core.

    Raises:
        ConfigError: the engine is `ray`, but Ray is not installed.
    """
    if engine == "ray":
        return RayExecutor(workers)
    return LocalExecutor(workers or len(os.sched_getaffinity(0)))


class LocalExecutor:
    """Local processes, reused across calls of `map`; one worker runs in the caller's process."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def map(self, work: Work[Item, Result], items: Sequence[Item]) -> Iterator[Result]:
        """Yields the results of `work` in the order of the items.

        If an item raises an error, pending items are cancelled, running ones are awaited and the
        error is raised.
        """
        if self.workers == 1 or len(items) <= 1:
            yield from map(work, items)
            return
        if self._pool is None:
            # Spawn, not fork: the caller may have threads (tokenizers, PyTorch), with which a fork
            # can deadlock
            self._pool = ProcessPoolExecutor(
                self.workers, mp_context=get_context("spawn"), initializer=_prepare_worker
            )
        running: deque[Future[Result]] = deque()
        try:
            for item in items:
                running.append(self._pool.submit(work, item))
                if len(running) >= self.workers + AHEAD:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            wait([future for future in running if not future.cancel()])


class RayExecutor:
    """Ray Data tasks on the cluster given by `RAY_ADDRESS`, or on the local machine."""

    def __init__(self, workers: int | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise ConfigError(
                f"engine: ray needs Ray; use engine: local, or {install('ray')}"
            ) from None
        self.workers = workers
        if not ray.is_initialized():
            options: dict[str, int | None] = (
                {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers}
            )
            ray.init(
                include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **options
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Does nothing: Ray keeps running, so that another build in this process can reuse it."""

    def map(self, work: Work[Item, Result], items: Sequence[Item]) -> Iterator[Result]:
        """Yields the results of `work` in the order of the items.

        An `EasyllmError` of an item is raised with its original type.
        """
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = [_ItemRow(number=i, item=encode(item)) for i, item in enumerate(items)]
        if not rows:
            return
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Call(work), compute=ray.data.TaskPoolStrategy(size=self.workers)
        )
        # Ray configures this logger when the first dataset is created, so it is set only here
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        found = sorted(done.iter_rows(), key=lambda row: row["number"])
        for row in found:
            if row["error"]:
                raise _restored(row["error"], row["message"])
            yield decode(work.result_type, row["result"])


class _ItemRow(TypedDict):
    """A Ray row; the item is a JSON string, so that Ray infers no types."""

    number: int
    item: str


class _ResultRow(TypedDict):
    """A Ray row: the result as a JSON string, or the class and message of an `EasyllmError`."""

    number: int
    result: str
    error: str
    message: str


class _Call(Generic[Item, Result]):
    """Processes one Ray row."""

    def __init__(self, work: Work[Item, Result]) -> None:
        self.work = work

    def __call__(self, row: _ItemRow) -> _ResultRow:
        number = row["number"]
        try:
            result = encode(self.work(decode(self.work.item_type, row["item"])))
        except EasyllmError as error:  # Ray would wrap the message in a traceback
            kind, message = type(error).__name__, str(error)
            return _ResultRow(number=number, result="", error=kind, message=message)
        return _ResultRow(number=number, result=result, error="", message="")


def _restored(name: str, message: str) -> Exception:
    """Returns the error of a work item from the name of its class and its message."""
    kind: type[Exception] = getattr(errors, name, EasyllmError)
    return kind(message)


def _prepare_worker() -> None:
    """Makes a worker ignore Ctrl-C, which the parent handles, and exit if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
