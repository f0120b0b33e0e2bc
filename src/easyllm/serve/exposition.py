"""Counters, gauges and histograms in the text format 0.0.4 of Prometheus.

The subset of a metrics library that the server needs: values are kept per combination of label
values, and rendered as text that Prometheus reads. Methods may be called from any thread.

Source: Prometheus documentation, "Exposition formats", text-based format, version 0.0.4.
"""

import math
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = tuple[str, ...]
"""Values of a metric's labels, in the order of their names."""


class Counter:
    """Numbers that only grow, by the values of their labels.

    Args:
        name: name of the metric; it ends in `_total`.
        help: one sentence.
        labels: names of the labels.

    Example:
        >>> requests = Counter("requests_total", "Requests.", ("route",))
        >>> requests.add(("/v1",), 2)
        >>> print(*requests.lines(), sep="\\n")
        # HELP requests_total Requests.
        # TYPE requests_total counter
        requests_total{route="/v1"} 2
    """

    def __init__(self, name: str, help: str, labels: Sequence[str]) -> None:
        assert name.endswith("_total"), "Prometheus's convention for counters"
        self.name, self.help, self.labels = name, help, tuple(labels)
        self._values: dict[Labels, float] = {}
        self._lock = threading.Lock()

    def add(self, labels: Labels, amount: float = 1) -> None:
        """Adds `amount` ≥ 0; 0 makes the metric visible before anything has happened."""
        with self._lock:
            self._values[labels] = self._values.get(labels, 0) + amount

    def value(self, labels: Labels) -> float:
        """Returns the number of these labels; 0 before the first `add`."""
        with self._lock:
            return self._values.get(labels, 0)

    def lines(self) -> Iterator[str]:
        """Yields the metric's lines in the text format."""
        with self._lock:
            values = dict(self._values)
        yield from _head(self.name, self.help, "counter")
        for labels, value in values.items():
            yield _sample(self.name, zip(self.labels, labels, strict=True), value)


class Gauge:
    """Numbers that are read when they are rendered.

    Args:
        name: name of the metric.
        help: one sentence.
        labels: names of the labels.
        read: returns the values by their labels.
    """

    def __init__(
        self,
        name: str,
        help: str,
        labels: Sequence[str],
        read: Callable[[], Iterable[tuple[Labels, float]]],
        *,
        kind: str = "gauge",
    ) -> None:
        self.name, self.help, self.labels = name, help, tuple(labels)
        self._read, self._kind = read, kind

    def lines(self) -> Iterator[str]:
        """Yields the metric's lines in the text format."""
        yield from _head(self.name, self.help, self._kind)
        for labels, value in self._read():
            yield _sample(self.name, zip(self.labels, labels, strict=True), value)


class Histogram:
    """Distributions of numbers, by the values of their labels.

    Args:
        name: name of the metric.
        help: one sentence.
        labels: names of the labels.
        buckets: upper bounds of the buckets, ascending; one more, infinite, is added.
    """

    def __init__(
        self, name: str, help: str, labels: Sequence[str], buckets: Sequence[float]
    ) -> None:
        assert list(buckets) == sorted(set(buckets)), "bounds are ascending"
        self.name, self.help, self.labels = name, help, tuple(labels)
        self._bounds = (*buckets, math.inf)
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}
        self._lock = threading.Lock()

    def observe(self, labels: Labels, value: float, count: int = 1) -> None:
        """Adds `count` observations of the same value."""
        with self._lock:
            counts = self._counts.get(labels)
            if counts is None:
                counts = self._counts[labels] = [0] * len(self._bounds)
                self._sums[labels] = 0.0
            counts[bisect_left(self._bounds, value)] += count
            self._sums[labels] += value * count

    def lines(self) -> Iterator[str]:
        """Yields the metric's lines in the text format; the counts of buckets are cumulative."""
        with self._lock:
            found = [
                (labels, list(counts), self._sums[labels])
                for labels, counts in self._counts.items()
            ]
        yield from _head(self.name, self.help, "histogram")
        for labels, counts, total in found:
            pairs, cumulative = list(zip(self.labels, labels, strict=True)), 0
            for bound, count in zip(self._bounds, counts, strict=True):
                cumulative += count
                yield _sample(f"{self.name}_bucket", [*pairs, ("le", _number(bound))], cumulative)
            yield _sample(f"{self.name}_sum", pairs, total)
            yield _sample(f"{self.name}_count", pairs, cumulative)


def _head(name: str, help: str, kind: str) -> Iterator[str]:
    escaped = help.replace("\\", r"\\").replace("\n", r"\n")
    yield f"# HELP {name} {escaped}"
    yield f"# TYPE {name} {kind}"


def _sample(name: str, labels: Iterable[tuple[str, str]], value: float) -> str:
    shown = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
    return f"{name}{{{shown}}} {_number(value)}" if shown else f"{name} {_number(value)}"


def _escaped(text: str) -> str:
    """Escapes a label's value; lone surrogates, which UTF-8 lacks, become escapes."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) else repr(float(value))
