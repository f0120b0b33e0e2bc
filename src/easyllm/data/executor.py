"""Where the stages of a corpus run: processes of this machine, or Ray on one node or a cluster.

A stage is a function of one item that writes its result atomically and returns a small JSON-like value; executors differ
in where they call it, never in what comes out. On a cluster the output folder must lie on storage every node sees.
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
from typing import Any, Literal, Protocol, Self

from easyllm.core.errors import ConfigError, install

Engine = Literal["local", "ray"]
Work = Callable[[dict[str, Any]], dict[str, Any]]
"""A function at the top of a module (it is sent to other processes by name), from JSON-like to JSON-like."""
AHEAD = 2
"""Items handed out beyond one a process, so that none waits."""


class Executor(Protocol):
    """Calls a function on every item; results come in the order of the items. A `with` block ends its processes."""

    def map(self, work: Work, items: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def build_executor(engine: Engine, workers: int | None = None) -> Executor:
    """The executor a recipe names; `workers` is by default one a core.

    Raises:
        ConfigError: Ray is asked for and not installed.
    """
    if engine == "ray":
        return RayExecutor(workers)
    return LocalExecutor(workers or len(os.sched_getaffinity(0)))


class LocalExecutor:
    """Processes of this machine, kept from one map to the next; a single one works in the caller's own."""

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

    def map(self, work: Work, items: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Results of `work`, in order; an error of one item ends the map with that error, nothing still running."""
        if self.workers == 1 or len(items) <= 1:
            yield from map(work, items)
            return
        if self._pool is None:
            # spawned, not forked: the caller may have threads (tokenizers, PyTorch) that a fork would leave hanging
            self._pool = ProcessPoolExecutor(
                self.workers, mp_context=get_context("spawn"), initializer=_prepare_worker
            )
        running: deque[Future[dict[str, Any]]] = deque()
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
    """Ray Data: tasks on the nodes of the cluster `RAY_ADDRESS` names, or on this machine."""

    def __init__(self, workers: int | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise ConfigError(
                f"engine: ray needs Ray; use engine: local, or {install('ray')}"
            ) from None
        self.workers = workers
        if not ray.is_initialized():
            options: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers}
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
        """Ray lasts as long as the process: another build in it goes on with the same one."""

    def map(self, work: Work, items: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Results of `work`, in order; a user's mistake in an item is raised as itself."""
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = [{"number": i, "item": json.dumps(item)} for i, item in enumerate(items)]
        if not rows:
            return
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Call(work), compute=ray.data.TaskPoolStrategy(size=self.workers)
        )
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # Ray sets it up with the first data
        found = sorted(done.iter_rows(), key=lambda row: row["number"])
        for row in found:
            result = json.loads(row["result"])
            if "mistake" in result:
                raise _mistake(result)
            yield result


class _Call:
    """One row of Ray's: the item goes in and the result comes out as JSON, so that no type is guessed."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from easyllm.core.errors import EasyllmError

        try:
            result = self.work(json.loads(row["item"]))
        except EasyllmError as error:  # Ray would bury the sentence in a traceback
            result = {"mistake": str(error), "kind": type(error).__name__}
        return {"number": row["number"], "result": json.dumps(result)}


def _mistake(result: dict[str, Any]) -> Exception:
    from easyllm.core import errors

    kind: type[Exception] = getattr(errors, result["kind"], errors.EasyllmError)
    return kind(result["mistake"])


def _prepare_worker() -> None:
    """Workers leave Ctrl-C to the parent, which ends them, and end by themselves when it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
