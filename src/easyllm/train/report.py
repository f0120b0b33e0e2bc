"""A run's page, `report.html`: curves, totals, events and samples, in one file that opens from disk.

It is drawn from `recipe.yaml`, `metrics.jsonl` and `manifest.json` alone, so it can be made while the run goes on, after it,
or on another machine. Curves are SVG made here; the script only adds a crosshair and reads the page again while it grows.

    metrics.jsonl → History, a series a name → Chart, which series together → figure, two points a column of pixels
"""

import base64
import hashlib
import html
import json
import math
import os
import re
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from easyllm.core.atomic import write_atomic
from easyllm.core.config import read_yaml
from easyllm.core.errors import ConfigError, SourceError
from easyllm.core.manifest import MANIFEST_FILE, Manifest
from easyllm.core.progress import format_duration
from easyllm.core.run_folder import RECIPE_FILE
from easyllm.train.metrics import FILE as METRICS_FILE

REPORT_FILE = "report.html"
COLUMNS, SMALL_COLUMNS = 400, 100
"""Of a curve, each of so many columns keeps its lowest and its highest value."""
MOST_FIGURES, MOST_EVENTS, MOST_PROMPTS, MOST_ROWS, MOST_CHARACTERS = 40, 100, 12, 20, 600
"""Keep the page small however long the run; what is left out is said."""
GIB = 2.0**30

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def write_report(run: Path, *, total_steps: int | None = None) -> Path:
    """The path of `report.html`, made new from what lies in the run's folder.

    Args:
        total_steps: where the run will end, if that is known.

    Raises:
        SourceError: `run` holds no run.
        OutputError: the page cannot be written.
    """
    return RunReport(run, total_steps=total_steps).write()


class RunReport:
    """The page of a run that goes on: each `write` reads only the lines of `metrics.jsonl` that are new.

    Example:
        report = RunReport(run, total_steps=1000)
        report.write()  # now and then
    """

    def __init__(self, run: Path, *, total_steps: int | None = None) -> None:
        self.run, self.total_steps = run, total_steps
        self._history = History(run / METRICS_FILE)

    def write(self) -> Path:
        """The path of the page. Raises as `write_report`."""
        if not any((self.run / name).is_file() for name in (RECIPE_FILE, METRICS_FILE)):
            raise SourceError(
                f"{str(self.run)!r} holds neither {RECIPE_FILE} nor {METRICS_FILE}; name the folder of a training run"
            )
        self._history.update()
        target = self.run / REPORT_FILE
        write_atomic(target, _page(_facts(self.run, self._history, self.total_steps)))
        return target


# ---- what the files say


class History:
    """What `metrics.jsonl` says; `update` reads the lines that are new."""

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
        """Takes in the whole lines that came; starts over where the file is another one (a resumed run's)."""
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
        for line in whole.splitlines():
            try:
                self._take(json.loads(line))
            except ValueError:  # one damaged line is no reason to show nothing
                continue

    def _take(self, line: Any) -> None:
        step = line.pop("step", None) if isinstance(line, dict) else None
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
        """Names of all series, in the order in which they came."""
        return list(self._series)

    def series(self, name: str) -> tuple[Floats, Floats]:
        """Steps, in order, and values; empty where the name never came."""
        steps, values = (
            np.array(part, dtype=np.float64) for part in self._series.get(name, ((), ()))
        )
        if np.any(np.diff(steps) < 0):
            order = np.argsort(steps, kind="stable")
            steps, values = steps[order], values[order]
        return steps, values

    def finite(self, name: str) -> tuple[Floats, Floats]:
        """The same without the values that are no numbers."""
        steps, values = self.series(name)
        keep = np.isfinite(values)
        return steps[keep], values[keep]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything the page shows."""

    name: str
    history: History
    recipe: dict[str, Any]
    recipe_text: str
    results: dict[str, Any]
    state: Literal["running", "finished", "stopped"]
    total_steps: int | None


def _facts(run: Path, history: History, total_steps: int | None) -> Facts:
    recipe: dict[str, Any] = {}
    text = ""
    if (run / RECIPE_FILE).is_file():
        text = (run / RECIPE_FILE).read_text(encoding="utf-8", errors="replace")
        try:
            recipe = read_yaml(run / RECIPE_FILE)
        except ConfigError:
            recipe = {}  # its text is shown all the same
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
    )


# ---- charts


@dataclass(frozen=True, slots=True)
class Curve:
    """A series and how it is drawn: `raw` is faint, under its running mean; `dots` are joined."""

    name: str
    label: str
    look: Literal["raw", "line", "dots"] = "line"


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over steps that share a unit; values are divided by `scale`."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    scale: float = 1.0
    from_zero: bool = False
    size: Literal["wide", "half", "small"] = "half"


CHARTS = (
    Chart(
        "Loss",
        "nats a token",
        (
            Curve("train/loss_nats", "training", "raw"),
            Curve("eval/loss_nats", "evaluation", "dots"),
        ),
        size="wide",
    ),
    Chart("Learning rate", "", (Curve("train/learning_rate", "rate"),), from_zero=True),
    Chart("Gradient norm", "before clipping", (Curve("train/grad_norm", "each step", "raw"),)),
    Chart("Speed", "tokens/s", (Curve("speed/tokens_per_s", "each step", "raw"),), from_zero=True),
    Chart(
        "Model FLOPs utilisation",
        "% of the device's peak",
        (Curve("speed/mfu", "each step", "raw"),),
        scale=0.01,
        from_zero=True,
    ),
    Chart(
        "Bits per byte",
        "bits/byte",
        (
            Curve("train/bits_per_byte", "training", "raw"),
            Curve("eval/bits_per_byte", "evaluation", "dots"),
        ),
    ),
)
MOST_LABELS = {"wide": (8, 10), "half": (5, 6), "small": (4, 4)}
"""Of the axis of values and of steps."""
UNITS = {"_bytes": ("GiB", GIB), "_nats": ("nats", 1.0), "_per_s": ("a second", 1.0)}
EVENTS = {"spike": "spikes", "skipped": "skipped", "resumed": "resumed"}
"""Kinds of events that are marked in the charts, and how the legend calls them."""


def _charts(history: History) -> tuple[list[Chart], list[Chart]]:
    """The charts everyone looks at, and one for each other name."""
    known = {curve.name for chart in CHARTS for curve in chart.curves}
    others = []
    names = (name for name in history.names() if name not in known)
    for name in sorted(names, key=lambda name: name.partition("/")[0]):
        unit, scale = next((UNITS[end] for end in UNITS if name.endswith(end)), ("", 1.0))
        others.append(Chart(name, unit, (Curve(name, "value"),), scale=scale, size="small"))
    return list(CHARTS), others


@dataclass(frozen=True, slots=True)
class Line:
    """A curve as it is drawn; between points of different `gaps` lies a value that is no number."""

    label: str
    look: str
    steps: Floats
    values: Floats
    gaps: Ints


def _lines(curve: Curve, steps: Floats, values: Floats, scale: float) -> Iterator[Line]:
    finite = np.isfinite(values)
    gaps = np.searchsorted(steps[~finite], steps[finite])
    steps, values = steps[finite], values[finite] / scale
    mean, width = running_mean(values) if curve.look == "raw" else (values, 1)
    if len(values) == 0:
        return
    if width == 1:
        yield Line(curve.label, curve.look.replace("raw", "line"), steps, values, gaps)
        return
    yield Line(curve.label, "raw", steps, values, gaps)
    yield Line(f"mean of {width}", "line", steps, mean, gaps)


def running_mean(values: Floats) -> tuple[Floats, int]:
    """The mean of each value and those before it, and of how many: a fiftieth of all, up to 1000.

    Of the first values it is a mean of fewer, a tenth of those so far, not to lag where a curve is steep.
    """
    width = max(1, min(1000, len(values) // 50))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    counts = np.clip(ends // 10, 1, width)
    return (sums[ends] - sums[ends - counts]) / counts, width


def shown_range(values: Floats, *, from_zero: bool = False) -> tuple[float, float]:
    """Bottom and top of an axis: the few values far from the rest are cut off, so that the rest can be read."""
    low, high = float(values.min()), float(values.max())
    if len(values) >= 50:
        bottom, top = (float(q) for q in np.quantile(values, (0.05, 0.95)))
        spread = top - bottom
        high = top + spread / 2 if high - top > 2 * spread > 0 else high
        low = bottom - spread / 2 if bottom - low > 2 * spread > 0 else low
    if from_zero and low >= 0:
        return 0.0, 1.05 * high or 1.0
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def kept_points(columns: Ints, values: Floats) -> Ints:
    """Indices, rising, of each column's lowest and highest value and of the last value.

    Args:
        columns: [n], never falling.
        values: [n], finite.
    """
    starts = np.flatnonzero(np.diff(columns, prepend=-1))
    sizes = np.diff(starts, append=len(columns))
    kept = [np.array([len(columns) - 1])]
    for extreme in (np.minimum, np.maximum):
        found = np.flatnonzero(values == np.repeat(extreme.reduceat(values, starts), sizes))
        kept.append(found[np.unique(columns[found], return_index=True)[1]])
    return np.unique(np.concatenate(kept))


@dataclass(frozen=True, slots=True)
class Axes:
    """Places in the 1000 × 1000 of a drawing."""

    first: float
    last: float
    low: float
    high: float

    def x(self, steps: Floats) -> Ints:
        return np.rint((steps - self.first) / (self.last - self.first) * 1000).astype(np.int64)

    def y(self, values: Floats) -> Ints:
        share = (self.high - values) / (self.high - self.low)
        return np.rint(np.clip(share, -1, 2) * 1000).astype(np.int64)


def _step_range(history: History) -> tuple[float, float]:
    """The same for all charts, so that one crosshair serves them all; a little wider than the steps."""
    first, last = float(history.first_step or 0), float(history.last_step)
    room = max(0.5, 0.01 * (last - first))
    return first - room, last + room


def _figure(chart: Chart, history: History) -> str:
    """The chart as HTML; empty where none of its names ever came."""
    series = [(curve, *history.series(curve.name)) for curve in chart.curves]
    if not any(len(steps) for _, steps, _ in series):
        return ""
    lines = [line for each in series for line in _lines(*each, chart.scale)]
    values = np.concatenate([np.zeros(0), *(line.values for line in lines)])
    low, high = shown_range(values, from_zero=chart.from_zero) if len(values) else (0.0, 1.0)
    axes = Axes(*_step_range(history), low, high)
    drawing, legend = [], []
    for line in lines:
        columns = axes.x(line.steps) * (SMALL_COLUMNS if chart.size == "small" else COLUMNS) // 1000
        kept = kept_points(columns, line.values)
        drawing.append(_path(line, axes, kept))
        legend.append(_curve_item(line, kept))
    bad = np.concatenate([steps[~np.isfinite(v)] for _, steps, v in series])
    marks = [("bad", "not finite", bad, "1000V930")]
    if chart.size != "small":
        for kind, label in EVENTS.items():
            at = np.array([step for step, what, _ in history.events if what == kind], np.float64)
            marks.append((kind, label, at, "0V1000"))
    for kind, label, at, stroke in marks:
        if len(at):
            ticks = "".join(f"M{x} {stroke}" for x in np.unique(axes.x(at)))
            drawing.insert(0, f'<path class="{kind}" d="{ticks}"/>')
            if kind == "bad" or chart.size == "wide":
                legend.append(f'<li class="{kind}">{label} <b>{len(at):,}</b></li>')
    newest = ", ".join(f"{line.label} {_number(line.values[-1])}" for line in lines)
    grid, labels = _grid(axes, *MOST_LABELS[chart.size])
    return (
        f'<figure class="{chart.size}"><figcaption><b>{_text(chart.title)}</b> {_text(chart.unit)} '
        f'<span class="at"></span>{_cut_note(lines, low, high)}</figcaption>'
        f'<ul>{"".join(legend)}</ul><div class="frame">{labels}<div class="plot">'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{_text(f"{chart.title}: {newest}")}">{grid}{"".join(drawing)}</svg>'
        "<i></i></div></div></figure>"
    )


def _path(line: Line, axes: Axes, kept: Ints) -> str:
    xs, ys = axes.x(line.steps[kept]), axes.y(line.values[kept])
    breaks = np.flatnonzero(np.diff(line.gaps[kept])) + 1
    pieces = []
    for x, y in zip(np.split(xs, breaks), np.split(ys, breaks), strict=True):
        moves = zip(np.diff(x).tolist(), np.diff(y).tolist(), strict=True)
        rest = " ".join(f"{dx} {dy}" for dx, dy in moves)
        pieces.append(f"M{x[0]} {y[0]}" + (f"l{rest}" if rest else "h0"))
    drawn = f'<path class="{line.look}" d="{"".join(pieces)}"/>'
    if len(kept) <= (COLUMNS // 4 if line.look == "dots" else 1):
        # a line of no length with round ends is a dot, however wide the chart is drawn
        dots = "".join(f"M{x} {y}h0" for x, y in zip(xs, ys, strict=True))
        drawn += f'<path class="{line.look} dot" d="{dots}"/>'
    return drawn


def _curve_item(line: Line, kept: Ints) -> str:
    """A line of the legend with the newest value, and for the crosshair the points that are drawn."""
    values = [_number(value) for value in line.values[kept].tolist()]
    steps = " ".join(f"{step:.0f}" for step in line.steps[kept].tolist())
    points = f'data-x="{steps}" data-y="{" ".join(values)}"'
    return f'<li class="{line.look}" {points}>{_text(line.label)} <b>{values[-1]}</b></li>'


def _cut_note(lines: list[Line], low: float, high: float) -> str:
    """Says how far the first curve goes beyond the axis."""
    if not lines:
        return ""
    steps, values = lines[0].steps, lines[0].values
    ends = [("up", int(values.argmax())), ("down", int(values.argmin()))]
    notes = [
        f"{way} to {_number(values[at])} at step {steps[at]:,.0f}"
        for way, at in ends
        if not low <= values[at] <= high
    ]
    return f"<small>{' and '.join(notes)}, off the chart</small>" if notes else ""


def _grid(axes: Axes, most_values: int, most_steps: int) -> tuple[str, str]:
    """Lines for the drawing, and the numbers beside and below it."""
    values = _round_values(axes.low, axes.high, most_values)
    steps = _round_values(axes.first, axes.last, most_steps, least=1.0)
    ys, xs = axes.y(np.array(values)).tolist(), axes.x(np.array(steps)).tolist()
    beside = zip(ys, _numbers(values), strict=True)
    below = zip(xs, _numbers(steps), strict=True)
    return (
        f'<path class="grid" d="{"".join(f"M0 {y}H1000" for y in ys)}"/>',
        '<div class="y">'
        + "".join(f'<span style="top:{y / 10}%">{number}</span>' for y, number in beside)
        + '</div><div class="x">'
        + "".join(f'<span style="left:{x / 10}%">{number}</span>' for x, number in below)
        + '</div><div class="corner">step</div>',
    )


def _round_values(low: float, high: float, most: int, least: float = 0.0) -> list[float]:
    """About `most` values between `low` and `high`, multiples of 1, 2 or 5 times a power of ten, at least `least` apart."""
    rough = max((high - low) / most, least)
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [n * apart for n in range(math.ceil(low / apart), math.floor(high / apart) + 1)]


# ---- words and numbers


def _number(value: float, digits: int = 4) -> str:
    """`2.346`, `12.35k`, `1.5e-4`: so many digits at most, and never a space."""
    size = abs(value)
    if not math.isfinite(value) or size >= 1e15:
        return f"{value:.{digits - 1}g}"
    if 0 < size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= max(limit, 9999.5):
            return f"{value / limit:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def _numbers(values: list[float]) -> list[str]:
    """The same with as many digits as tell all of them apart."""
    words = [_number(value) for value in values]
    return words if len(set(words)) == len(words) else [_number(value, 9) for value in values]


_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def _text(value: Any) -> str:
    """`value` as text of a page, whatever it holds."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", str(value)))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"


# ---- the page


def _page(facts: Facts) -> str:
    main, others = _charts(facts.history)
    figures = "".join(_figure(chart, facts.history) for chart in main)
    body = [_head(facts)]
    body.append(f'<section class="charts">{figures or "<p>No step is logged yet.</p>"}</section>')
    body += [_samples(facts.history.samples), _events(facts.history.events)]
    if others:
        title = f"Other metrics ({len(others)})"
        small = "".join(_figure(chart, facts.history) for chart in others[:MOST_FIGURES])
        left = len(others) - MOST_FIGURES
        note = f"<p>{left} more are in {METRICS_FILE}.</p>" if left > 0 else ""
        body.append(_folded("metrics", title, f'<section class="charts">{small}</section>{note}'))
    if facts.recipe_text:
        body.append(_folded("recipe", "Recipe", f"<pre>{_text(facts.recipe_text)}</pre>"))
    first, last = _step_range(facts.history)
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(facts.name)} · {facts.state}</title>\n<style>{_STYLE}</style></head>\n"
        f'<body data-state="{facts.state}" data-first="{first}" data-last="{last}">\n'
        f"{chr(10).join(part for part in body if part)}\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _head(facts: Facts) -> str:
    now = time.time()
    iso = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    tiles = "".join(
        f"<div><dt>{label}</dt><dd>{value}</dd><dd class=note>{note}</dd></div>"
        for label, value, note in _tiles(facts)
    )
    recipe = " · ".join(
        f"<span>{_text(_short(part))}</span>" for part in _recipe_words(facts.recipe)
    )
    bar = ""
    if facts.state != "finished" and facts.total_steps:
        bar = f'<progress max="{facts.total_steps}" value="{facts.history.last_step}"></progress>'
    return (
        f"<header><h1>{_text(facts.name)}</h1>"
        f'<p class="state {facts.state}"><b>{facts.state}</b> {_text(_where(facts))}</p>'
        f'<p class="note">as of <time datetime="{iso}">{written}</time></p></header>'
        f'{bar}<p class="recipe">{recipe}</p><dl>{tiles}</dl>'
    )


def _where(facts: Facts) -> str:
    """`at step 120 of 3,000 · about 4m10s left`."""
    last = facts.history.last_step
    words = f"at step {last:,}"
    if facts.total_steps and facts.state != "finished":
        words += f" of {facts.total_steps:,}"
        seconds = _seconds(facts.history)
        if facts.state == "running" and len(seconds) and last < facts.total_steps:
            left = (facts.total_steps - last) * float(seconds[-50:].mean())
            words += f" · about {format_duration(left)} left"
    ends = [detail for _, kind, detail in facts.history.events if kind == "stopped" and detail]
    return words + (f" · {_short(ends[-1])}" if ends and facts.state != "running" else "")


def _recipe_words(recipe: dict[str, Any]) -> Iterator[str]:
    """What the run does, in a few words."""
    if not recipe:
        return
    model, adapter, data = (recipe.get(name) for name in ("model", "adapter", "data"))
    if isinstance(model, dict):
        size = [f"{k} {model[k]}" for k in ("depth", "size") if model.get(k) is not None]
        model = f"a fresh model ({', '.join(size) or 'own configuration'})"
    yield str(model)
    yield _kind(adapter, "rank") if adapter else "every weight trained"
    if isinstance(data, dict):
        files = data.get("shards") or data.get("train") or ()
        yield "on " + ", ".join([files] if isinstance(files, str) else map(str, files))
    yield _kind(recipe.get("optimizer"), "learning_rate")
    yield f"{_kind(recipe.get('schedule'))} schedule"
    for name, unit in (("batch_size", "sequences a step"), ("batch_tokens", "tokens a step")):
        if recipe.get(name):
            yield f"{recipe[name]:,} {unit}"
    yield f"seed {recipe.get('seed', 0)}"


def _kind(value: Any, key: str | None = None) -> str:
    """`lora, rank 16` for a variant of a recipe."""
    if not isinstance(value, dict):
        return str(value)
    words = str(value.get("kind", "")).replace("_", " ")
    return f"{words}, {key.replace('_', ' ')} {value[key]}" if key in value and key else words


def _tiles(facts: Facts) -> Iterator[tuple[str, str, str]]:
    """Label, value and note of each total."""
    history = facts.history
    steps, losses = history.finite("train/loss_nats")
    if len(losses):
        mean, width = running_mean(losses)
        note = f"nats a token, mean of the last {width}" if width > 1 else "nats a token"
        yield "Training loss", _number(mean[-1]), note
    steps, losses = history.finite("eval/loss_nats")
    if len(losses):
        best = int(losses.argmin())
        yield "Best evaluation", _number(losses[best]), f"nats a token, at step {steps[best]:,.0f}"
    tokens, every = _all_steps(history, history.finite("train/tokens")[1])
    trained, _ = _all_steps(history, history.finite("train/trained_tokens")[1])
    if tokens:
        tokens = facts.results.get("tokens", tokens)
        yield "Tokens", every + _number(tokens), f"{_number(trained)} trained" if trained else ""
    seconds = _seconds(history)
    if len(seconds):
        total, every = _all_steps(history, seconds)
        yield "Training time", every + format_duration(total), "without evaluations"
        speed = history.finite("speed/tokens_per_s")[1]
        yield "Speed", _number(float(np.median(speed[-50:]))), "tokens/s, median of the last 50"
    noted = [v for k, v in facts.results.items() if k.startswith("peak_") and k.endswith("_bytes")]
    peak = max([*history.finite("memory/peak_bytes")[1].tolist(), *noted], default=None)
    if peak is not None:
        yield "Peak memory", f"{peak / GIB:.2f}", "GiB"


def _all_steps(history: History, values: Floats) -> tuple[float, str]:
    """The sum over all steps, and `about ` where only some of them are logged."""
    if len(values) == 0:
        return 0.0, ""
    share = max(1.0, history.last_step / len(values))
    return float(values.sum()) * share, "about " if share > 1 else ""


def _seconds(history: History) -> Floats:
    """Of each logged step."""
    tokens, speed = history.series("train/tokens")[1], history.series("speed/tokens_per_s")[1]
    if len(tokens) != len(speed):
        return np.zeros(0)
    keep = np.isfinite(tokens) & np.isfinite(speed) & (speed > 0)
    return tokens[keep] / speed[keep]


def _samples(lines: list[tuple[int, list[Any]]]) -> str:
    """A table a prompt: what the model said at which step, the newest first."""
    if not lines:
        return ""
    spread = np.unique(np.linspace(0, len(lines) - 1, MOST_ROWS).astype(int))[::-1]
    rows: dict[str, list[tuple[int, str]]] = {}
    for step, samples in (lines[i] for i in spread):
        for sample in samples:
            if isinstance(sample, dict):
                row = step, str(sample.get("text", ""))
                rows.setdefault(str(sample.get("prompt", "")), []).append(row)
    tables = [
        f'<p class="prompt" dir="auto">{_text(_short(prompt))}</p>'
        + _table(("Step", "Continuation"), ((f"{step:,}", _short(text)) for step, text in said))
        for prompt, said in list(rows.items())[:MOST_PROMPTS]
    ]
    notes = []
    if len(lines) > len(spread):
        notes.append(f"{len(spread)} of {len(lines)} steps with samples are shown")
    if len(rows) > MOST_PROMPTS:
        notes.append(f"{MOST_PROMPTS} of {len(rows)} prompts are shown")
    note = f"<p class=note>{'; '.join(notes)}; all are in {METRICS_FILE}.</p>" if notes else ""
    return f"<section><h2>Samples</h2>{''.join(tables)}{note}</section>"


def _events(events: list[tuple[int, str, str]]) -> str:
    if not events:
        return ""
    shown = events[: -MOST_EVENTS - 1 : -1]
    table = _table(("Step", "Event", "Detail"), ((f"{s:,}", k, _short(d)) for s, k, d in shown))
    left = len(events) - len(shown)
    note = f"<p class=note>{left:,} earlier ones are in {METRICS_FILE}.</p>" if left else ""
    return f"<section><h2>Events</h2>{table}{note}</section>"


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in titles)
    lines = (
        "<tr>" + "".join(f'<td dir="auto">{_text(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _folded(name: str, title: str, content: str) -> str:
    return f'<details id="{name}"><summary>{title}</summary>{content}</details>'


_STYLE = """
:root {
  color-scheme: light dark; --page: #f6f7f8; --card: #fff; --text: #1c2427; --muted: #5b676d; --line: #d3dadd;
  --accent: #1f6b66; --soft: #e1edec; --bad: #a4262c; --bad-soft: #fbeaea; --second: #b3530b;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #14181a; --card: #1d2326; --text: #e5eaec; --muted: #9ba8ae; --line: #39434a;
  --accent: #78c6bb; --soft: #22383a; --bad: #ff9a96; --bad-soft: #3a2223; --second: #f0a860;
} }
* { box-sizing: border-box; }
body {
  max-width: 72rem; margin: 0 auto; padding: 1rem 1rem 3rem; background: var(--page); color: var(--text); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif;
}
h1 { font-size: 1.5rem; margin: 0; } h2, summary { font-size: 1.1rem; font-weight: 600; margin: 1.4rem 0 .5rem; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem 1rem; } header p { margin: 0; }
header > :last-child { margin-left: auto; }
.state b { padding: .15rem .6rem; margin-right: .3rem; border-radius: 1rem; background: var(--soft); color: var(--accent); }
.state.stopped b { background: var(--bad-soft); color: var(--bad); }
progress { display: block; width: 100%; height: .4rem; margin: .6rem 0; accent-color: var(--accent); }
.recipe, .note, figcaption, figcaption + ul, .frame { color: var(--muted); font-size: .875rem; }
.recipe { margin: .5rem 0 .8rem; } .recipe span:first-child, figcaption b { color: var(--text); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 0 0 .8rem; }
dl > div, figure, .table, pre { margin: 0; padding: .7rem .9rem; background: var(--card); border: 1px solid var(--line); border-radius: .8rem; }
dt { font-size: .875rem; } dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; } dd.note { font-size: .8125rem; line-height: 1.3; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .8rem; }
details .charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
figure { min-width: 0; } figure.wide { grid-column: 1 / -1; }
figure:focus-visible { outline: 2px solid var(--accent); }
figcaption { min-height: 1.5rem; } figcaption small { font-size: .8125rem; float: right; } .at { color: var(--text); font-variant-numeric: tabular-nums; }
figure ul { display: flex; flex-wrap: wrap; gap: 0 1.1rem; margin: 0 0 .4rem; padding: 0; list-style: none; font-variant-numeric: tabular-nums; }
figure li::before { content: ""; display: inline-block; width: 1rem; margin-right: .4rem; vertical-align: .25em; border-top: 2.5px solid var(--accent); }
figure li b { color: var(--text); } figure.small li { font-size: .8125rem; }
figure li.raw::before { opacity: .4; } figure li.dots::before { border-color: var(--second); }
figure li:is(.spike, .skipped, .bad)::before, figure li.resumed::before { width: 0; height: .8rem; vertical-align: -.1em; border: 0; border-left: 2px solid var(--bad); }
figure li.skipped::before { border-left-style: dotted; } figure li.resumed::before { border-left: 2px dashed var(--muted); }
.frame { display: grid; grid-template: "y plot" 9.5rem "corner x" 1.6rem / 3.2rem 1fr; font-size: .8125rem; font-variant-numeric: tabular-nums; }
.wide .frame { grid-template-rows: 19rem 1.6rem; } .small .frame { grid-template-rows: 6rem 1.6rem; }
.plot { grid-area: plot; position: relative; touch-action: pan-y; } .y, .x { grid-area: y; position: relative; } .x { grid-area: x; } .corner { grid-area: corner; }
.y span { position: absolute; right: .5rem; transform: translateY(-50%); } .x span { position: absolute; white-space: nowrap; top: .3rem; transform: translateX(-50%); }
.corner { padding: .3rem .5rem 0 0; text-align: right; }
svg { display: block; width: 100%; height: 100%; border: solid var(--line); border-width: 0 0 1px 1px; }
path { fill: none; stroke: var(--accent); stroke-width: 1.75; stroke-linecap: round; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.grid { stroke: var(--line); stroke-width: 1; opacity: .6; } path.raw { stroke-width: 1; opacity: .4; }
path.dots { stroke: var(--second); } path.dot { stroke-width: 6; }
path:is(.spike, .skipped, .bad) { stroke: var(--bad); stroke-width: 1; opacity: .7; stroke-linecap: butt; } path.bad { stroke-width: 2.5; opacity: 1; }
path.skipped { stroke-dasharray: 1 3; } path.resumed { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 5 4; stroke-linecap: butt; }
.plot i { position: absolute; top: 0; bottom: 0; width: 0; border-left: 1px solid var(--text); display: none; pointer-events: none; }
.prompt { margin: .8rem 0 .3rem; padding: .4rem .9rem; border-radius: .6rem; background: var(--soft); white-space: pre-wrap; }
.table { padding: .2rem .9rem; max-height: 24rem; overflow: auto; } table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th, td { padding: .35rem 1rem .35rem 0; text-align: start; vertical-align: top; border-bottom: 1px solid var(--line); } tr:last-child > td { border: 0; }
th { font-size: .8125rem; color: var(--muted); } td:first-child { white-space: nowrap; font-variant-numeric: tabular-nums; width: 5rem; } td + td:not(:last-child) { width: 6rem; } td:last-child { white-space: pre-wrap; }
th, td:not(:last-child) { overflow-wrap: normal; }
summary { cursor: pointer; } pre { margin: 0; overflow-x: auto; font-size: .875rem; white-space: pre-wrap; }
"""

_SCRIPT = """
"use strict";
const first = Number(document.body.dataset.first), last = Number(document.body.dataset.last);
const figures = [...document.querySelectorAll("figure")].map(node => ({
  node, plot: node.querySelector(".plot"), cross: node.querySelector(".plot i"), at: node.querySelector(".at"),
  curves: [...node.querySelectorAll("[data-x]")].map(item => ({
    steps: item.dataset.x.split(" ").map(Number), values: item.dataset.y.split(" "), label: item.querySelector("b"),
  })),
}));

/** The index of the last point at or before a step (the first where there is none). */
function before(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) { const middle = (low + high + 1) >> 1; if (steps[middle] <= step) low = middle; else high = middle - 1; }
  return low;
}

/** Puts the crosshair of every chart at a step; null takes it away and shows the newest values again. */
function show(step) {
  for (const { cross, at, curves } of figures) {
    cross.style.display = step === null ? "" : "block";
    cross.style.left = step === null ? "" : 100 * (step - first) / (last - first) + "%";
    at.textContent = step === null ? "" : "at step " + step.toLocaleString("en");
    for (const { steps, values, label } of curves) label.textContent = values[step === null ? values.length - 1 : before(steps, step)];
  }
}

for (const { node, plot, curves } of figures) {
  const steps = curves.length ? curves[0].steps : [];
  if (!steps.length) continue;
  let index = steps.length - 1;
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect(), step = first + (last - first) * (event.clientX - box.left) / box.width;
    index = before(steps, step);
    if (index + 1 < steps.length && steps[index + 1] - step < step - steps[index]) index++;
    show(steps[index]);
  });
  plot.addEventListener("pointerleave", () => show(null));
  node.tabIndex = 0;
  node.addEventListener("keydown", event => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    index = Math.min(Math.max(index + move, 0), steps.length - 1);
    show(steps[index]);
  });
  node.addEventListener("blur", () => show(null));
}

// What is unfolded stays so when the page is read again.
const opened = { get: id => { try { return sessionStorage.getItem("open-" + id); } catch { return null; } },
  set: (id, value) => { try { sessionStorage.setItem("open-" + id, value); } catch { /* storage may be forbidden */ } } };
for (const node of document.querySelectorAll("details")) {
  node.open = opened.get(node.id) === "true";
  node.addEventListener("toggle", () => opened.set(node.id, node.open));
}

const written = document.querySelector("time"), writtenAt = Date.parse(written.dateTime);
written.textContent = new Date(writtenAt).toLocaleString();
if (document.body.dataset.state === "running") {
  const minutes = Math.floor((Date.now() - writtenAt) / 60000);
  if (minutes >= 5) written.after(", " + minutes + " minutes ago: the run may have been interrupted");
  setInterval(() => {
    const busy = document.hidden || document.querySelector("figure:hover, figure:focus") || String(getSelection());
    if (!busy) location.reload();
  }, 15000);
}
"""
