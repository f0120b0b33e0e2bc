"""Progress lines: a live line on a terminal, otherwise a plain line every few seconds.

All output goes to standard error, so that standard output contains results only. rich respects
`NO_COLOR`.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

PLAIN_INTERVAL_S = 5.0
QUIET_S = 2.0
"""Work that takes less time than this prints no plain line at all."""


def console() -> "Console":
    """Returns the console for messages to the user (standard error)."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, quiet=not is_first_rank())


def is_first_rank() -> bool:
    """Whether this process reports to the user: all do but the ranks after 0 of a divided run."""
    return os.environ.get("RANK", "0") == "0"


def format_duration(seconds: float) -> str:
    """Formats a duration: `75.0` → `'1m15s'`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def format_count(value: float) -> str:
    """Formats a number with a unit prefix: `12345` → `'12.3k'`."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.1f}{unit}"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"


def format_rate(per_s: float, unit: str) -> str:
    """Formats a rate, below one per second as its inverse: `0.05` → `'20 s/step'`."""
    if 0 < per_s < 1:
        return f"{format_count(1 / per_s)} s/{unit}"
    return f"{format_count(per_s)} {unit}/s"


class Progress:
    """A progress line with the rate and the remaining time.

    Example:
        with Progress("training", total=100, unit="step") as progress:
            for _ in range(100):
                progress.advance(1, loss=2.31)
    """

    def __init__(self, label: str, *, total: float | None = None, unit: str = "it") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self._start = self._shown = time.monotonic()
        self._skipped = 0.0
        self._live = sys.stderr.isatty()
        self._fields: dict[str, str] = {}
        self._width = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        elapsed = time.monotonic() - self._start
        if self._live or (elapsed >= QUIET_S and kind is None):
            self._show(final=True)

    def skip(self, amount: float) -> None:
        """Counts `amount` as done before the timer started (in a resumed run)."""
        self.done += amount
        self._skipped += amount

    def advance(self, amount: float = 1, **fields: float | str) -> None:
        """Counts another `amount` as done; `fields` are shown after the rate."""
        self.done += amount
        self._fields.update(
            {k: v if isinstance(v, str) else f"{v:.4g}" for k, v in fields.items()},
        )
        now = time.monotonic()
        if now - self._shown >= (0.1 if self._live else PLAIN_INTERVAL_S):
            self._shown = now
            self._show()

    def line(self) -> str:
        """Returns the current text of the line."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self._skipped) / elapsed
        count = format_count(self.done)
        if self.total:
            count += f"/{format_count(self.total)}"
        parts = [f"{count} {self.unit}", format_rate(rate, self.unit)]
        if self.total and rate > 0 and self.done < self.total:
            parts.append(f"{format_duration((self.total - self.done) / rate)} left")
        else:
            parts.append(format_duration(elapsed))
        parts += [f"{key} {value}" for key, value in self._fields.items()]
        return f"{self.label}: " + " · ".join(parts)

    def _show(self, *, final: bool = False) -> None:
        if not is_first_rank():
            return
        text = self.line()
        if self._live:
            padded = text.ljust(self._width)
            self._width = len(text)
            sys.stderr.write(f"\r{padded}" + ("\n" if final else ""))
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()


def track(items: Iterable[T], label: str, *, total: int | None = None, unit: str) -> Iterator[T]:
    """Yields `items` while showing a progress line."""
    with Progress(label, total=total, unit=unit) as progress:
        for item in items:
            yield item
            progress.advance()
