"""Is this run normal? Bands of loss, gradient norm, speed and memory that shipped recipes have.

A band is made from runs of the recipe with several seeds (`tools/bands.py`): at some steps, the
range of the mean over the steps since the one before, widened. A run of the recipe is compared
with it at each evaluation and at its end. With another model or other data, loss and gradients are
different by right, and only speed and memory are compared.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from easyllm.core.errors import DataError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.core.run_folder import recipes_folder

FOLDER = "expected"
LOSS, NORM, SPEED, MEMORY = "train/loss_nats", "train/grad_norm", "speed/mfu", "memory/peak_bytes"
BY_STEP = (LOSS, NORM)
"""Metrics with a range for each of some steps; the others have one for the run."""
IRRELEVANT = (
    *("output", "seed", "name", "log_every", "eval_every", "save_every", "keep_checkpoints"),
    *("samples", "tensorboard", "retention", "device"),
)
"""Keys that change no expectation."""
DEFINING = ("model", "data")
"""Keys whose change makes loss and gradient norm incomparable."""


@dataclass(frozen=True, slots=True)
class Range:
    """The least and the greatest usual value."""

    low: float
    high: float

    def side(self, value: float) -> int:
        """Returns -1 below the range, 1 above it or if the value is not finite, 0 inside."""
        if not math.isfinite(value) or value > self.high:
            return 1
        return -1 if value < self.low else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """What runs of a recipe look like.

    Attributes:
        recipe: its name.
        config: its resolved configuration.
        runs: number of runs that it was made from.
        steps: the steps that have ranges, in ascending order.
        by_step: for loss and gradient norm, a range for each of `steps`.
        whole: ranges of speed (share of the matmul rate) and peak memory (bytes).
    """

    recipe: str
    config: JsonMapping
    runs: int
    steps: Sequence[int]
    by_step: Mapping[str, Sequence[Range]]
    whole: Mapping[str, Range]

    def as_dict(self) -> JsonObject:
        """Returns the content of the band's file."""
        return {
            "recipe": self.recipe,
            "runs": self.runs,
            "steps": list(self.steps),
            "by_step": {
                name: [[r.low, r.high] for r in ranges] for name, ranges in self.by_step.items()
            },
            "whole": {name: [r.low, r.high] for name, r in self.whole.items()},
            "config": dict(self.config),
        }


def band_file(recipe: str) -> Path:
    """Returns the file of a band; it may not exist.

    Args:
        recipe: the recipe's name, or RECIPE/STAGE of a training within a recipe of several stages.
    """
    return recipes_folder() / FOLDER / f"{recipe.replace('/', '.')}.json"


def load_band(recipe: str) -> Band | None:
    """Returns the band of a shipped recipe; None if it has none.

    Raises:
        DataError: the file is damaged.
    """
    path = band_file(recipe)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Band(
            recipe=found["recipe"],
            config=found["config"],
            runs=int(found["runs"]),
            steps=[int(step) for step in found["steps"]],
            by_step={
                name: [Range(float(low), float(high)) for low, high in ranges]
                for name, ranges in found["by_step"].items()
            },
            whole={name: Range(float(r[0]), float(r[1])) for name, r in found["whole"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"the file of expected values {str(path)!r} is damaged ({error}); reinstall the package"
        ) from None


def portable(config: JsonMapping, root: Path | None = None) -> JsonObject:
    """Returns a configuration whose paths are the same on every machine.

    Args:
        config: the configuration of a training.
        root: the folder of the run that it is a stage of; None if it is not one.
    """
    text = json.dumps(dict(config))
    for folder, name in ((root, "run"), (recipes_folder(), "recipes")):
        if folder is not None:
            text = text.replace(json.dumps(str(folder))[1:-1], name)
    found: JsonObject = json.loads(text)
    return found


def changes(
    config: JsonMapping, band: Band, root: Path | None = None
) -> list[tuple[str, object, object]]:
    """Returns (key, the recipe's value, this run's value) of what was changed and matters.

    Args:
        config, root: as for `portable`.
        band: the recipe's band.
    """
    return [
        change
        for change in _differences("", band.config, portable(config, root))
        if change[0].split(".")[0] not in IRRELEVANT
    ]


def _differences(
    prefix: str, one: JsonMapping, other: JsonMapping
) -> Iterator[tuple[str, object, object]]:
    for key in sorted({*one, *other}):
        left, right = one.get(key), other.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            yield from _differences(f"{prefix}{key}.", left, right)
        elif left != right:
            yield f"{prefix}{key}", left, right


@dataclass(slots=True)
class Watch:
    """A run as it goes, in the steps of a band.

    Attributes:
        band: the band.
        means: for each metric of `BY_STEP`, its mean at each step of the band that was reached.
        speeds: shares of the matmul rate of all logged steps but the first, which compiles.
        memory: peak memory in bytes.
        first_loss: loss of the first step.
    """

    band: Band
    means: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in BY_STEP})
    speeds: list[float] = field(default_factory=list)
    memory: float = 0.0
    first_loss: float | None = None
    _open: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in BY_STEP})

    def add(self, figures: Mapping[str, float]) -> None:
        """Adds the metrics of a step; steps come in order."""
        step = int(figures["step"])
        if self.first_loss is None:
            self.first_loss = figures[LOSS]
        for name in BY_STEP:
            self._open[name].append(figures.get(name, math.nan))
        if SPEED in figures and step > 1:
            self.speeds.append(figures[SPEED])
        self.memory = max(self.memory, figures.get(MEMORY, 0.0))
        reached = len(self.means[LOSS])
        if reached < len(self.band.steps) and step >= self.band.steps[reached]:
            for name in BY_STEP:
                self.means[name].append(_mean(self._open[name]))
                self._open[name].clear()

    def sides(self) -> dict[str, int]:
        """Returns for each metric whether it is below (-1), inside (0) or above (1) its range.

        Of metrics by step, the last step that was reached counts.
        """
        found = {}
        reached = len(self.means[LOSS])
        for name, ranges in self.band.by_step.items():
            if reached:
                found[name] = ranges[reached - 1].side(self.means[name][-1])
        if self.speeds and SPEED in self.band.whole:
            found[SPEED] = self.band.whole[SPEED].side(_median(self.speeds))
        if self.memory and MEMORY in self.band.whole:
            found[MEMORY] = self.band.whole[MEMORY].side(self.memory)
        return found

    def shown(self, name: str) -> str:
        """Returns a metric's value and its range as text."""
        if name in BY_STEP:
            place = len(self.means[name]) - 1
            value, usual = self.means[name][place], self.band.by_step[name][place]
        else:
            value = self.memory if name == MEMORY else _median(self.speeds)
            usual = self.band.whole[name]
        if name == MEMORY:
            return f"{value / 1e9:.2f} GB, usual {usual.low / 1e9:.2f} to {usual.high / 1e9:.2f}"
        return f"{value:.3g}, usual {usual.low:.3g} to {usual.high:.3g}"


def make_band(recipe: str, config: JsonMapping, runs: Sequence[Sequence[JsonMapping]]) -> Band:
    """Makes a band from the lines of `metrics.jsonl` of several runs.

    A range is widened on both sides by the spread of the runs, and at least by a tenth of the value
    (speed: half, because machines differ; memory: a quarter).

    Args:
        recipe: the recipe's name.
        config: its resolved configuration.
        runs: the logged steps of each run.
    """
    last = min(int(run[-1]["step"]) for run in runs)
    steps = sorted({max(1, round(last * share)) for share in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)})
    empty = Band(recipe=recipe, config=config, runs=len(runs), steps=steps, by_step={}, whole={})
    watches = []
    for run in runs:
        watch = Watch(empty)
        for line in run:
            watch.add({k: float(v) for k, v in line.items() if isinstance(v, int | float)})
        watches.append(watch)
    by_step = {
        name: [
            _widened([watch.means[name][place] for watch in watches], 0.1)
            for place in range(len(steps))
        ]
        for name in BY_STEP
    }
    whole = {MEMORY: _widened([watch.memory for watch in watches], 0.25)}
    if all(watch.speeds for watch in watches):
        whole[SPEED] = _widened([_median(watch.speeds) for watch in watches], 0.5)
    return Band(
        recipe=recipe,
        config=portable(config),
        runs=len(runs),
        steps=steps,
        by_step=by_step,
        whole=whole,
    )


def _widened(values: Sequence[float], share: float) -> Range:
    low, high = min(values), max(values)
    margin = max(high - low, share * max(abs(low), abs(high)))
    least = 0.0 if low >= 0 else -math.inf  # what is never negative is not expected to be
    return Range(max(low - margin, least), high + margin)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.nan if len(finite) < len(values) or not values else sum(finite) / len(finite)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


__all__ = [
    "DEFINING",
    "LOSS",
    "MEMORY",
    "NORM",
    "SPEED",
    "Band",
    "Range",
    "Watch",
    "band_file",
    "changes",
    "load_band",
    "make_band",
    "portable",
]
