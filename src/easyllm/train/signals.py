"""SIGTERM and Ctrl-C end a run after the step at hand, with a checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from easyllm.core.errors import EasyllmError


class Interrupted(EasyllmError):
    """A run was asked to end; its checkpoint is written, the same command goes on with it.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal, self.exit_code = number, 128 + number


class StopRequest:
    """Whether, and by which signal, the run was asked to end."""

    signal: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Notes the first SIGTERM or SIGINT instead of dying of it; a second one has its usual effect.

    Outside the main thread, where Python allows no handlers, nothing is noted.
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
