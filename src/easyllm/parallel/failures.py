"""What a rank reports when it fails: the sentence of a timeout, and a record for launchers.

The launcher reads `TORCHELASTIC_ERROR_FILE`, the file in which `torchrun` also looks for the
exception of a worker.
"""

import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from easyllm.core.errors import EasyllmError

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
LOST = ("Connection closed by peer", "Connection reset", "Connection refused", "Broken pipe")
"""Parts of the messages that a rank gets because another one has ended."""
PATIENCE_S = 5.0
"""Time in which the store must say which ranks are late."""
TIMED_OUT = ("Timed out", "timed out", "timeout")


class CollectiveError(EasyllmError):
    """A collective failed because another rank ended or did not join it."""

    exit_code = 1


@contextmanager
def collective_errors(timeout_s: float, late_ranks: Callable[[], list[int]]) -> Iterator[None]:
    """Turns the errors of collectives into sentences.

    Args:
        timeout_s: the timeout of collectives.
        late_ranks: returns the ranks that have made the least progress.

    Raises:
        CollectiveError: another rank ended, or a collective timed out.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if any(part in text for part in LOST):
            raise CollectiveError("another rank has ended; its own error says why") from error
        if not any(part in text for part in TIMED_OUT):
            raise
        late = _within(PATIENCE_S, late_ranks)
        who = f"rank {', '.join(map(str, late))} did not join a collective within {timeout_s:g} s"
        doing = "look at what that rank was doing"
        if not late:
            who = f"a collective did not end within {timeout_s:g} s, and no rank is late"
            doing = "check that they reach each other"
        raise CollectiveError(f"{who}; {doing}, or raise parallel.timeout_s") from error


def _within(seconds: float, late_ranks: Callable[[], list[int]]) -> list[int]:
    """Returns the late ranks; an empty list if that is not known soon.

    The store that knows is gone with rank 0; if rank 0 cannot be reached, no answer ever comes.
    """
    found: list[int] = []

    def ask() -> None:
        with suppress(RuntimeError):
            found.extend(late_ranks())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return list(found)


def record_error(error: BaseException) -> bool:
    """Writes an exception to the launcher's error file; returns whether there is a launcher."""
    path = os.environ.get(ERROR_FILE)
    if not path:
        return False
    lost = isinstance(error, CollectiveError) and "another rank" in str(error)
    lost = lost or any(part in str(error) for part in LOST)
    stack = "".join(traceback.format_exception(error))
    is_user_error = isinstance(error, EasyllmError)
    extra = {"py_callstack": stack, "timestamp": str(int(time.time()))}
    record = {
        "message": {"message": f"{type(error).__name__}: {error}", "extraInfo": extra},
        "easyllm": {
            "time": time.time(),
            "lost": lost,
            "sentence": str(error) if isinstance(error, EasyllmError) else "",
            "traceback": "" if is_user_error else stack,
            "exit_code": error.exit_code if isinstance(error, EasyllmError) else 1,
        },
    }
    with suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump(record, file)
    return True


__all__ = ["ERROR_FILE", "CollectiveError", "collective_errors", "record_error"]
