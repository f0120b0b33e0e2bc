"""Charts as SVG: grouping of series, decimation to two points per pixel column, axis labels."""

import html
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from easyllm.reporting.history import Floats, History, Ints

COLUMNS, SMALL_COLUMNS = 400, 100
"""Number of columns of a curve, each of which keeps only its minimum and maximum value."""
GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class Curve:
    """A series and how it is drawn.

    Attributes:
        name: name of the metric.
        label: label in the legend.
        look: `raw` is drawn faintly, below its running mean; `dots` are connected points.
    """

    name: str
    label: str
    look: Literal["raw", "line", "dots"] = "line"


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over steps that share a unit.

    Attributes:
        title: title of the chart.
        unit: unit of the values, shown next to the title.
        curves: the curves.
        scale: divisor of the values.
        from_zero: whether the value axis starts at 0.
        size: size on the page.
    """

    title: str
    unit: str
    curves: tuple[Curve, ...]
    scale: float = 1.0
    from_zero: bool = False
    size: Literal["wide", "half", "small"] = "half"


CHARTS = (
    Chart(
        "Loss",
        "nats per token",
        (
            Curve("train/loss_nats", "training", "raw"),
            Curve("eval/loss_nats", "evaluation", "dots"),
        ),
        size="wide",
    ),
    Chart(
        "Loss on the retention set",
        "nats per token",
        (Curve("retention/loss_nats", "retention", "dots"),),
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
MAX_LABELS = {"wide": (8, 10), "half": (5, 6), "small": (4, 4)}
"""Approximate maximum number of labels on the value axis and on the step axis, by chart size."""
UNITS = {"_bytes": ("GiB", GIB), "_nats": ("nats", 1.0), "_per_s": ("per second", 1.0)}
EVENTS = {"spike": "spikes", "skipped": "skipped", "resumed": "resumed"}
"""Kinds of events that are marked in the charts, and their labels in the legend."""


def charts_of(history: History) -> tuple[list[Chart], list[Chart]]:
    """Returns the main charts, and one small chart for each other metric."""
    known = {curve.name for chart in CHARTS for curve in chart.curves}
    others = []
    names = (name for name in history.names() if name not in known)
    for name in sorted(names, key=lambda name: name.partition("/")[0]):
        unit, scale = next((UNITS[end] for end in UNITS if name.endswith(end)), ("", 1.0))
        others.append(Chart(name, unit, (Curve(name, "value"),), scale=scale, size="small"))
    return list(CHARTS), others


@dataclass(frozen=True, slots=True)
class Line:
    """A curve as it is drawn, without its non-finite values.

    Attributes:
        label: label in the legend.
        look: as `Curve.look`.
        steps, values: [n], finite.
        gaps: [n], number of non-finite values before each point; the line is interrupted where it
            changes.
    """

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
    """Returns the trailing running mean of `values: [n]` and its window, n / 50 up to 1000.

    Near the start, the window is a tenth of the values so far, to avoid lag where a curve is steep.
    """
    width = max(1, min(1000, len(values) // 50))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    counts = np.clip(ends // 10, 1, width)
    return (sums[ends] - sums[ends - counts]) / counts, width


def shown_range(values: Floats, *, from_zero: bool = False) -> tuple[float, float]:
    """Returns the lower and upper bound of an axis, excluding a few far outliers."""
    low, high = float(values.min()), float(values.max())
    if len(values) >= 50:
        bottom, top = (float(q) for q in np.quantile(values, (0.05, 0.95)))
        spread = top - bottom
        high = top + spread / 2 if high - top > 2 * spread > 0 else high
        low = bottom - spread / 2 if bottom - low > 2 * spread > 0 else low
    if from_zero and low >= 0:
        return 0.0, 1.05 * high or 1.0
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def decimate(columns: Ints, values: Floats) -> Ints:
    """Returns sorted indices of each column's minimum and maximum, and of the last value.

    Args:
        columns: column of each value [n], non-decreasing.
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
    """Maps steps and values to SVG coordinates of 1000 × 1000.

    Attributes:
        first, last: bounds of the step axis.
        low, high: bounds of the value axis.
    """

    first: float
    last: float
    low: float
    high: float

    def x(self, steps: Floats) -> Ints:
        """Returns the x coordinates of steps."""
        return np.rint((steps - self.first) / (self.last - self.first) * 1000).astype(np.int64)

    def y(self, values: Floats) -> Ints:
        """Returns the y coordinates of values, clipped to one height beyond the axis."""
        share = (self.high - values) / (self.high - self.low)
        return np.rint(np.clip(share, -1, 2) * 1000).astype(np.int64)


def step_range(history: History) -> tuple[float, float]:
    """Returns the bounds of the step axis, with a margin; one crosshair serves all charts."""
    first, last = float(history.first_step or 0), float(history.last_step)
    margin = max(0.5, 0.01 * (last - first))
    return first - margin, last + margin


def figure(chart: Chart, history: History) -> str:
    """Returns a chart as HTML; empty if the history has none of its metrics."""
    series = [(curve, *history.series(curve.name)) for curve in chart.curves]
    if not any(len(steps) for _, steps, _ in series):
        return ""
    lines = [line for each in series for line in _lines(*each, chart.scale)]
    values = np.concatenate([np.zeros(0), *(line.values for line in lines)])
    low, high = shown_range(values, from_zero=chart.from_zero) if len(values) else (0.0, 1.0)
    axes = Axes(*step_range(history), low, high)
    drawing, legend = [], []
    for line in lines:
        columns = axes.x(line.steps) * (SMALL_COLUMNS if chart.size == "small" else COLUMNS) // 1000
        kept = decimate(columns, line.values)
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
    newest = ", ".join(f"{line.label} {number_text(line.values[-1])}" for line in lines)
    grid, labels = _grid(axes, *MAX_LABELS[chart.size])
    return (
        f'<figure class="{chart.size}"><figcaption><b>{escaped(chart.title)}</b> '
        f'{escaped(chart.unit)} <span class="at"></span>{_cut_note(lines, low, high)}</figcaption>'
        f'<ul>{"".join(legend)}</ul><div class="frame">{labels}<div class="plot">'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{escaped(f"{chart.title}: {newest}")}">{grid}{"".join(drawing)}</svg>'
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
        # a zero-length line with round caps stays a round dot at any aspect ratio
        dots = "".join(f"M{x} {y}h0" for x, y in zip(xs, ys, strict=True))
        drawn += f'<path class="{line.look} dot" d="{dots}"/>'
    return drawn


def _curve_item(line: Line, kept: Ints) -> str:
    """Returns a legend entry with the newest value, and the drawn points for the crosshair."""
    values = [number_text(value) for value in line.values[kept].tolist()]
    steps = " ".join(f"{step:.0f}" for step in line.steps[kept].tolist())
    points = f'data-x="{steps}" data-y="{" ".join(values)}"'
    return f'<li class="{line.look}" {points}>{escaped(line.label)} <b>{values[-1]}</b></li>'


def _cut_note(lines: list[Line], low: float, high: float) -> str:
    """Returns a note on how far the first curve extends beyond the axis."""
    if not lines:
        return ""
    steps, values = lines[0].steps, lines[0].values
    ends = [("up", int(values.argmax())), ("down", int(values.argmin()))]
    notes = [
        f"{way} to {number_text(values[at])} at step {steps[at]:,.0f}"
        for way, at in ends
        if not low <= values[at] <= high
    ]
    return f"<small>{' and '.join(notes)}, off the chart</small>" if notes else ""


def _grid(axes: Axes, most_values: int, most_steps: int) -> tuple[str, str]:
    """Returns the grid lines as SVG, and the axis labels as HTML."""
    values = _round_values(axes.low, axes.high, most_values)
    steps = _round_values(axes.first, axes.last, most_steps, least=1.0)
    ys, xs = axes.y(np.array(values)).tolist(), axes.x(np.array(steps)).tolist()
    at_left = zip(ys, _numbers(values), strict=True)
    below = zip(xs, _numbers(steps), strict=True)
    return (
        f'<path class="grid" d="{"".join(f"M0 {y}H1000" for y in ys)}"/>',
        '<div class="y">'
        + "".join(f'<span style="top:{y / 10}%">{number}</span>' for y, number in at_left)
        + '</div><div class="x">'
        + "".join(f'<span style="left:{x / 10}%">{number}</span>' for x, number in below)
        + '</div><div class="corner">step</div>',
    )


def _round_values(low: float, high: float, most: int, least: float = 0.0) -> list[float]:
    """Returns about `most` round values between `low` and `high`, at least `least` apart.

    The spacing is 1, 2 or 5 times a power of ten.
    """
    rough = max((high - low) / most, least)
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [n * apart for n in range(math.ceil(low / apart), math.floor(high / apart) + 1)]


# ---- text and numbers


def number_text(value: float, digits: int = 4) -> str:
    """Formats a number with at most `digits` digits: `2.346`, `12.35k`, `1.5e-4`; no spaces."""
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
    """Formats several numbers, with more digits if they would otherwise look the same."""
    words = [number_text(value) for value in values]
    return words if len(set(words)) == len(words) else [number_text(value, 9) for value in values]


_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def escaped(value: object) -> str:
    """Escapes arbitrary text for HTML; replaces unprintable characters."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", str(value)))
