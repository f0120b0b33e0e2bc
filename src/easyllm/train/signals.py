"""Graceful shutdown: on SIGTERM or Ctrl-C, a run finishes its step and writes a checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """A request to stop the run.

    Attributes:
        signal: number of the signal that requested it; None if there was none.
    """

    signal: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Records the first SIGTERM or SIGINT instead of terminating; a second has its usual effect.

    Outside the main thread, where Python allows no signal handlers, signals are not recorded.
    """
    request = StopRequest()
    old: dict[int, object] = {}

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal = number
        for each, handler in old.items():
            signal.signal(each, handler)  # type: ignore[arg-type]

    try:
        for number in (int(signal.SIGTERM), int(signal.SIGINT)):
            old[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
