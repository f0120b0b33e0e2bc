"""`metrics.jsonl`: one JSON object per line; the names of metrics include their units."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from easyllm.core.atomic import output_errors, write_atomic
from easyllm.core.json_types import JsonObject
from easyllm.core.jsonl import read_json_objects

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends metrics to `metrics.jsonl`; on resume, drops lines from after the checkpoint.

    Args:
        run: the run's folder.
        after_step: the step of the checkpoint; lines of later steps are dropped.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, run: Path, *, after_step: int) -> None:
        self.path = run / FILE
        kept = [line for line in read_metrics(run) if line.get("step", 0) <= after_step]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, **figures: Any) -> None:
        """Appends one line."""
        with output_errors(self.path):
            self._file.write(json.dumps(figures) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with suppress(OSError):  # a full disk was already reported when a line was written
            self._file.close()


def read_metrics(run: Path) -> list[JsonObject]:
    """Returns the lines of a run's `metrics.jsonl`, skipping damaged ones."""
    return read_json_objects(run / FILE)
