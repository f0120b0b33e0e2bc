"""Metrics as functions of sums, so that every score has an interval and can be compared in pairs.

A metric maps each item to a vector of statistics, and the sum of these vectors to a value: a mean
is (value, 1), BLEU's counts of n-grams and lengths, perplexity nats and tokens. A bootstrap
resample is then a vector of counts times the matrix of statistics (Koehn 2004 for BLEU; Efron and
Tibshirani 1993, chapter 13).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from easyllm.core.errors import ConfigError, suggest
from easyllm.core.json_types import JsonObject

Floats = NDArray[np.float64]
Needs = Literal["text", "choices", "likelihoods", "nats", "tests"]
"""What a metric reads: generated text and references; which choice is right; the log-probability
of each choice; the loss of a text; whether the tests of a program passed."""
RESAMPLES, SEED = 1000, 0
LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a model did with an item.

    Attributes:
        answer: the extracted answer; None if the response has none.
        references: the right answers.
        chosen: number of the choice that was generated; None if unparsed.
        gold: number of the right choice.
        likelihoods: log-probability of each choice in nats.
        choices: the texts of the choices.
        nats, tokens, bytes, words: loss of a text, and its size.
        passed: whether the program passed its tests.
    """

    answer: str | None = None
    references: tuple[str, ...] = ()
    chosen: int | None = None
    gold: int | None = None
    likelihoods: tuple[float, ...] = ()
    choices: tuple[str, ...] = ()
    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    words: int = 0
    passed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A metric.

    Attributes:
        name: its name in results.
        needs: what it reads.
        statistics: maps an item's outcome to its vector of statistics.
        value: maps sums of such vectors, [R, S], to values, [R].
        is_mean: whether the value is the mean over items, whose standard error is exact.
        lower_is_better: whether a lower value is better.
    """

    name: str
    needs: Needs
    statistics: Callable[[Outcome], Sequence[float]]
    value: Callable[[Floats], Floats]
    is_mean: bool = True
    lower_is_better: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The value of a metric over items.

    Attributes:
        name: name of the metric.
        value: its value.
        standard_error: of a mean, s/√n with n - 1 degrees of freedom; otherwise the standard
            deviation of the bootstrap values. None for a single item.
        low, high: 95% bootstrap interval (percentiles of 1,000 resamples); None for one item.
        n: number of items.
        details: further figures, such as BLEU's precisions.
    """

    name: str
    value: float
    standard_error: float | None
    low: float | None
    high: float | None
    n: int
    details: JsonObject = field(default_factory=dict)


def mean_metric(
    name: str, needs: Needs, of: Callable[[Outcome], float], *, scale: float = 1.0
) -> Metric:
    """Returns a metric that is the mean of a number per item, times `scale`."""

    def value(sums: Floats) -> Floats:
        return scale * sums[:, 0] / sums[:, 1]

    return Metric(
        name=name, needs=needs, statistics=lambda outcome: (of(outcome), 1.0), value=value
    )


def table(metric: Metric, outcomes: Sequence[Outcome]) -> Floats:
    """Returns the statistics of all items, [n, S]."""
    return np.array([metric.statistics(each) for each in outcomes], dtype=np.float64)


def score(metric: Metric, statistics: Floats, *, seed: int = SEED) -> Score:
    """Returns the value of a metric with its standard error and bootstrap interval.

    Args:
        metric: the metric.
        statistics: [n, S], of each item (`table`); n > 0.
        seed: seed of the resamples.
    """
    count = len(statistics)
    value = float(metric.value(statistics.sum(0, keepdims=True))[0])
    if count < 2:
        return Score(
            name=metric.name, value=value, standard_error=None, low=None, high=None, n=count
        )
    values = bootstrap(metric, statistics, seed=seed)
    low, high = interval(values)
    error = float(values.std(ddof=1))
    if metric.is_mean:
        each = metric.value(statistics)
        error = float(each.std(ddof=1) / np.sqrt(count))
    return Score(name=metric.name, value=value, standard_error=error, low=low, high=high, n=count)


def bootstrap(metric: Metric, statistics: Floats, *, seed: int = SEED) -> Floats:
    """Returns the values of `RESAMPLES` samples of the items, drawn with replacement."""
    rng, values = np.random.default_rng(seed), []
    for _ in range(0, RESAMPLES, block := _block(len(statistics))):
        values.append(metric.value(_counts(rng, len(statistics), block) @ statistics))
    return np.concatenate(values)[:RESAMPLES]


def interval(values: Floats) -> tuple[float, float]:
    """Returns the percentiles between which 95% of the values are."""
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(values[np.isfinite(values)], [tail, 100 - tail])
    return float(low), float(high)


def paired_difference(
    metric: Metric, first: Floats, second: Floats, *, seed: int = SEED
) -> JsonObject:
    """Compares two models on the same items: the difference, its interval and its p-value.

    The interval is a paired bootstrap. The p-value is that of approximate randomization (Noreen
    1989; Riezler and Maxwell 2005): the share of random exchanges of the two models' outcomes, item
    by item, with a difference at least as large, over 10,000 exchanges; both counts have 1 added.

    Args:
        metric: the metric.
        first, second: [n, S], the statistics of both models, item by item.

    Returns:
        `difference` (second - first), `low`, `high`, `p_value`, and the counts of items on which
        each is `better` (of a mean only).
    """
    rng, count = np.random.default_rng(seed), len(first)
    totals = np.stack([first.sum(0), second.sum(0)])
    values = metric.value(totals)
    difference = float(values[1] - values[0])
    drawn, larger, exchanges = [], 0, 10 * RESAMPLES
    block = _block(count)
    for _ in range(0, RESAMPLES, block):
        counts = _counts(rng, count, block)
        drawn.append(metric.value(counts @ second) - metric.value(counts @ first))
    for _ in range(0, exchanges, block):
        swapped = rng.random((block, count)) < 0.5
        moved = swapped @ (second - first)
        found = metric.value(totals[1] - moved) - metric.value(totals[0] + moved)
        larger += int((np.abs(found) >= abs(difference) * (1 - 1e-12)).sum())
    done = -(-exchanges // block) * block
    low, high = interval(np.concatenate(drawn)[:RESAMPLES])
    result: JsonObject = {
        "name": metric.name,
        "first": float(values[0]),
        "second": float(values[1]),
        "difference": difference,
        "low": low,
        "high": high,
        "p_value": (larger + 1) / (done + 1),
        "n": count,
    }
    if metric.is_mean:
        gaps = metric.value(second) - metric.value(first)
        sign = -1 if metric.lower_is_better else 1
        result["first_better"] = int((sign * gaps < 0).sum())
        result["second_better"] = int((sign * gaps > 0).sum())
    return result


def find_metrics(names: Sequence[str], known: Mapping[str, Metric]) -> list[Metric]:
    """Returns metrics by name.

    Raises:
        ConfigError: one is not known.
    """
    for name in names:
        if name not in known:
            raise ConfigError(
                f"metric {name!r} is not known{suggest(name, known)}; there are {', '.join(known)}"
            )
    return [known[name] for name in names]


def _counts(rng: np.random.Generator, count: int, rows: int) -> Floats:
    """Returns how often each of `count` items is drawn in `rows` samples of `count` items."""
    return rng.multinomial(count, np.full(count, 1 / count), size=rows).astype(np.float64)


def _block(count: int) -> int:
    """Returns the number of samples that are drawn at once: at most 8 MB of counts."""
    return max(1, min(RESAMPLES, 2**20 // max(1, count)))


__all__ = [
    "Floats",
    "Metric",
    "Needs",
    "Outcome",
    "Score",
    "bootstrap",
    "find_metrics",
    "interval",
    "mean_metric",
    "paired_difference",
    "score",
    "table",
]
