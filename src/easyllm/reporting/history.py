"""Reads the files of a run: `metrics.jsonl` incrementally, the recipe and the results."""

import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.core.jsonl import json_objects
from easyllm.core.manifest import MANIFEST_FILE, Manifest
from easyllm.core.run_folder import RECIPE_FILE
from easyllm.core.yaml_text import read_yaml

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class History:
    """The contents of `metrics.jsonl`; `update` reads the lines added since the last call.

    Args:
        path: path of `metrics.jsonl`.

    Attributes:
        first_step, last_step: the smallest and largest step in the file.
        events: step, kind and detail of each event.
        samples: step and sample completions of each line with samples.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._inode = path, 0
        self._clear()

    def _clear(self) -> None:
        self._offset = self.last_step = 0
        self.first_step: int | None = None
        self.events: list[tuple[int, str, str]] = []
        self.samples: list[tuple[int, list[Any]]] = []
        self._series: dict[str, tuple[array[float], array[float]]] = {}

    def update(self) -> None:
        """Reads the complete new lines; starts over if a resumed run has replaced the file."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._clear()
                self._inode = status.st_ino
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in json_objects(whole):
            self._take(line)

    def _take(self, line: JsonObject) -> None:
        step = line.pop("step", None)
        if not isinstance(step, int):
            return
        self.last_step = max(self.last_step, step)
        self.first_step = step if self.first_step is None else min(self.first_step, step)
        if "event" in line:
            self.events.append((step, str(line["event"]), str(line.get("detail", ""))))
            return
        for name, value in line.items():
            if isinstance(value, float | int):
                if name not in self._series:
                    self._series[name] = array("d"), array("d")
                steps, values = self._series[name]
                steps.append(step)
                values.append(value)
            elif name == "samples" and isinstance(value, list):
                self.samples.append((step, value))

    def names(self) -> list[str]:
        """Returns the names of all series, in order of first appearance."""
        return list(self._series)

    def series(self, name: str) -> tuple[Floats, Floats]:
        """Returns the sorted steps and the values of a series, [n] each; empty if unknown."""
        steps, values = (
            np.array(part, dtype=np.float64) for part in self._series.get(name, ((), ()))
        )
        if np.any(np.diff(steps) < 0):
            order = np.argsort(steps, kind="stable")
            steps, values = steps[order], values[order]
        return steps, values

    def finite(self, name: str) -> tuple[Floats, Floats]:
        """Returns the same as `series`, without NaN and infinite values."""
        steps, values = self.series(name)
        keep = np.isfinite(values)
        return steps[keep], values[keep]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that the page shows.

    Attributes:
        name: name of the run's folder.
        history: the contents of `metrics.jsonl`.
        recipe, recipe_text: the recipe, parsed and as text; empty if missing or invalid.
        results: the results in the manifest of a finished run.
        state: `running` unless finished or stopped.
        total_steps: number of steps of the complete run; None if unknown.
        diagnosis: what is unusual in the run, as `easyllm rl doctor --json` prints it; None if it
            was not examined.
    """

    name: str
    history: History
    recipe: JsonObject
    recipe_text: str
    results: JsonObject
    state: Literal["running", "finished", "stopped"]
    total_steps: int | None
    diagnosis: JsonObject | None = None


def read_facts(
    run: Path,
    history: History,
    total_steps: int | None,
    diagnose: Callable[[Path], JsonObject] | None = None,
) -> Facts:
    """Reads the current contents of a run's folder, and examines a run that has metrics."""
    recipe: JsonObject = {}
    text = ""
    if (run / RECIPE_FILE).is_file():
        text = (run / RECIPE_FILE).read_text(encoding="utf-8", errors="replace")
        try:
            recipe = read_yaml(run / RECIPE_FILE)
        except ConfigError:
            recipe = {}  # its text is still shown
    finished = (run / MANIFEST_FILE).is_file()
    turns = [kind for _, kind, _ in history.events if kind in ("stopped", "resumed")]
    return Facts(
        name=run.resolve().name,
        history=history,
        recipe=recipe,
        recipe_text=text,
        results=Manifest.read(run / MANIFEST_FILE).results if finished else {},
        state="finished" if finished else "stopped" if turns[-1:] == ["stopped"] else "running",
        total_steps=total_steps or recipe.get("max_steps"),
        diagnosis=None if diagnose is None or history.first_step is None else diagnose(run),
    )
