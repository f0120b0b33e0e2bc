"""The numbers of all replicas, brought together: metrics in one text, engines in one list."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from easyllm.core.json_types import JsonObject

KEPT_S = 10.0
"""Seconds after which the numbers of a replica that no longer reports are left out."""


@dataclass(frozen=True, slots=True)
class Report:
    """The last report of a replica: when it came, its metrics, and its engine view."""

    time_s: float
    metrics: str
    view: JsonObject


class Board:
    """Keeps the latest report of each replica; it runs as an actor of Ray."""

    def __init__(self) -> None:
        self._reports: dict[str, Report] = {}

    def put(self, replica: str, metrics: str, view: JsonObject) -> None:
        """Takes a report."""
        self._reports[replica] = Report(time.monotonic(), metrics, view)

    def get(self) -> dict[str, Report]:
        """Returns the reports by replica, without those of replicas that are gone."""
        oldest = time.monotonic() - KEPT_S
        self._reports = {name: r for name, r in self._reports.items() if r.time_s >= oldest}
        return dict(self._reports)


def merged_metrics(reports: Mapping[str, Report]) -> str:
    """Returns the metrics of all replicas in Prometheus's text format, with a label `replica`.

    >>> one = Report(0, '# TYPE a gauge\\na 1\\n', {})
    >>> two = Report(0, '# TYPE a gauge\\na{x="y"} 2\\n', {})
    >>> print(merged_metrics({"r1": one, "r2": two}), end="")
    # TYPE a gauge
    a{replica="r1"} 1
    a{replica="r2",x="y"} 2
    """
    families: dict[str, tuple[list[str], list[str]]] = {}  # heads and samples, by name
    for replica, report in reports.items():
        family = ""
        for line in report.metrics.splitlines():
            if line.startswith("#"):
                family = line.split(" ", 3)[2]
                heads, _ = families.setdefault(family, ([], []))
                if line not in heads:
                    heads.append(line)
            else:
                families[family][1].append(_labelled(line, replica))
    lines = (line for heads, samples in families.values() for line in (*heads, *samples))
    return "".join(f"{line}\n" for line in lines)


def _labelled(sample: str, replica: str) -> str:
    """Adds the label `replica` to a sample."""
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f'{name}{{replica="{replica}",{rest}'
    name, value = sample.rsplit(" ", 1)
    return f'{name}{{replica="{replica}"}} {value}'


def merged_view(reports: Mapping[str, Report]) -> JsonObject:
    """Returns the engine views of all replicas as one, with the replica in each engine's name."""
    engines = [
        {**engine, "name": f"{engine['name']} · replica {number}"}
        for number, (_, report) in enumerate(sorted(reports.items()), start=1)
        for engine in report.view["engines"]
    ]
    return {"engines": engines}
