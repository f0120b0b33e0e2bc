"""Python's collector of cyclic garbage while a program starts.

The collector runs each time some hundred objects were created, and examines many that already were
there. Importing torch creates a quarter of a million objects, hardly any of which is garbage: the
collector takes a tenth of the time of such a start.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Runs a block, such as the loading of a model, without the collector."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """Runs a block of imports without the collector, which never examines its objects later either.

    Modules live as long as the process. Without them, full collections in a server take
    milliseconds instead of a tenth of a second, and the process ends sooner. If everything was
    imported before, the objects of the program stay under the collector's control.
    """
    before = len(sys.modules)
    with collector_paused():
        yield
        if len(sys.modules) > before:
            gc.freeze()


__all__ = ["collector_paused", "importing"]
