"""Executors that run the stages of a corpus build: local processes, or Ray on a node or a cluster.

A stage is a function of one work item that writes its output atomically and returns a small
JSON-like value. Executors differ only in where they call it, not in the result. On a cluster the
output folder must be on storage that is shared by all nodes.
"""

import json
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from types import TracebackType
from typing import Literal, Protocol, Self

from easyllm.core.errors import ConfigError, install
from easyllm.core.json_types import JsonObject

Engine = Literal["local", "ray"]
Work = Callable[[JsonObject], JsonObject]
"""A module-level function (it is pickled by name) that maps a JSON-like dict to another."""
AHEAD = 2
"""Number of items submitted beyond one per process, so that no process is idle."""


class Executor(Protocol):
    """Calls a function on every item; as a context manager, it ends its processes on exit."""

    def map(self, work: Work, items: Sequence[JsonObject]) -> Iterator[JsonObject]:
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

    def map(self, work: Work, items: Sequence[JsonObject]) -> Iterator[JsonObject]:
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
        running: deque[Future[JsonObject]] = deque()
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
            options: JsonObject = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers}
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

    def map(self, work: Work, items: Sequence[JsonObject]) -> Iterator[JsonObject]:
        """Yields the results of `work` in the order of the items.

        An `EasyllmError` of an item is raised with its original type.
        """
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = [{"number": i, "item": json.dumps(item)} for i, item in enumerate(items)]
        if not rows:
            return
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Call(work), compute=ray.data.TaskPoolStrategy(size=self.workers)
        )
        # Ray configures this logger when the first dataset is created, so it is set only here
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        found = sorted(done.iter_rows(), key=lambda row: row["number"])
        for row in found:
            result = json.loads(row["result"])
            if "mistake" in result:
                raise _mistake(result)
            yield result


class _Call:
    """Processes one Ray row; item and result are JSON strings, so that Ray infers no types."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, row: JsonObject) -> JsonObject:
        from easyllm.core.errors import EasyllmError

        try:
            result = self.work(json.loads(row["item"]))
        except EasyllmError as error:  # Ray would wrap the message in a traceback
            result = {"mistake": str(error), "kind": type(error).__name__}
        return {"number": row["number"], "result": json.dumps(result)}


def _mistake(result: JsonObject) -> Exception:
    from easyllm.core import errors

    kind: type[Exception] = getattr(errors, result["kind"], errors.EasyllmError)
    return kind(result["mistake"])


def _prepare_worker() -> None:
    """Makes a worker ignore Ctrl-C, which the parent handles, and exit if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
