"""The metrics of a run as series by name, for the doctor; it reads files and loads no torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from easyllm.core.errors import DataError
from easyllm.core.json_types import JsonObject
from easyllm.core.jsonl import read_json_objects

METRICS, MANIFEST = "metrics.jsonl", "manifest.json"
WINDOW = 3
"""A run is compared in parts of a third, and a jump is one of three steps."""


@dataclass(frozen=True, slots=True)
class History:
    """The metrics of a run.

    Attributes:
        series: the values of each metric in order of the steps, by name.
        events: number of events of each kind (`skipped`, `spike` ...).
        data: what became of the rows of the data, from the manifest of a finished run.
        dtype: dtype of the matrix products, from the same manifest; empty if it is not known.
    """

    series: dict[str, list[float]]
    events: dict[str, int] = field(default_factory=dict)
    data: JsonObject = field(default_factory=dict)
    dtype: str = ""

    def has(self, name: str) -> bool:
        """Returns whether a metric was logged."""
        return bool(self.series.get(name))

    def values(self, name: str) -> list[float]:
        """Returns the values of a metric; an empty list if it was not logged."""
        return self.series.get(name, [])

    def last(self, name: str) -> float:
        """Returns the mean of the last third of a metric."""
        values = self.values(name)
        return mean(values[-max(1, len(values) // WINDOW) :])

    def first(self, name: str) -> float:
        """Returns the mean of the first third of a metric."""
        values = self.values(name)
        return mean(values[: max(1, len(values) // WINDOW)])

    def mean(self, name: str) -> float:
        """Returns the mean of a metric over the run."""
        return mean(self.values(name))

    def largest_rise(self, name: str) -> float:
        """Returns the largest lasting increase of a metric, from three logged steps to three.

        A single step of few answers is noise. In a run of few steps, fewer are compared.
        """
        values = self.values(name)
        ends = range(1, max(2, len(values) - WINDOW + 1)) if len(values) > 1 else ()
        rises = (mean(values[i : i + WINDOW]) - mean(values[max(0, i - WINDOW) : i]) for i in ends)
        return max(0.0, *rises, 0.0)


def mean(values: Sequence[float]) -> float:
    """Returns the mean of values; 0 without any."""
    return sum(values) / len(values) if values else 0.0


def read_history(run: Path) -> History:
    """Reads the metrics of a run, finished or not.

    Raises:
        DataError: the folder has no metrics.
    """
    lines = read_json_objects(run / METRICS)
    if not lines:
        raise DataError(
            f"{str(run)!r} has no {METRICS} with metrics; give the output folder of a training run"
        )
    series: dict[str, list[float]] = {}
    events: dict[str, int] = {}
    for line in lines:
        if "event" in line:
            events[str(line["event"])] = events.get(str(line["event"]), 0) + 1
        for name, value in line.items():
            if isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(name, []).append(float(value))
    results = _results_of(run)
    data, dtype = results.get("data"), results.get("dtype")
    return History(
        series,
        events,
        data if isinstance(data, dict) else {},
        dtype if isinstance(dtype, str) else "",
    )


def _results_of(run: Path) -> JsonObject:
    try:
        manifest = json.loads((run / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    found = manifest.get("results", {}) if isinstance(manifest, dict) else {}
    return found if isinstance(found, dict) else {}


__all__ = ["History", "mean", "read_history"]
