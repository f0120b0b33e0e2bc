"""Metrics of probabilities: accuracy of choices, calibration, perplexity, bits per byte."""

import math
from collections.abc import Callable

import numpy as np

from easyllm.evaluate.metric import Floats, Metric, Outcome, mean_metric

ECE_BINS = 10


def likelihood_metrics() -> dict[str, Metric]:
    """Returns the metrics of choices and of texts by name.

    accuracy compares summed log-probabilities; accuracy_norm divides them by the characters
    (code points) of a choice, accuracy_bytes by its UTF-8 bytes, as lm-eval's acc, acc_norm and
    acc_bytes do. Of generated letters, accuracy is the share that is right.
    """
    found = [
        mean_metric(
            "accuracy", "choices", lambda outcome: float(choice_of(outcome) == outcome.gold)
        ),
        mean_metric("accuracy_norm", "likelihoods", lambda outcome: _normalized(outcome, _chars)),
        mean_metric("accuracy_bytes", "likelihoods", lambda outcome: _normalized(outcome, _bytes)),
        Metric(
            name="ece",
            needs="likelihoods",
            statistics=calibration_statistics,
            value=calibration_error,
            is_mean=False,
            lower_is_better=True,
        ),
        _text_metric("perplexity", 1, exponential=True),
        _text_metric("bits_per_byte", 2, exponential=False),
        _text_metric("byte_perplexity", 2, exponential=True),
        _text_metric("word_perplexity", 3, exponential=True),
    ]
    return {metric.name: metric for metric in found}


def choice_of(outcome: Outcome) -> int | None:
    """Returns the number of the choice that was generated, or of the most likely one."""
    if outcome.likelihoods:
        return _best(outcome.likelihoods)
    return outcome.chosen


def probabilities(likelihoods: tuple[float, ...]) -> Floats:
    """Returns the softmax of log-probabilities: the share of each choice."""
    values = np.array(likelihoods, dtype=np.float64)
    shares: Floats = np.exp(values - values.max())
    shares /= shares.sum()
    return shares


def calibration_statistics(outcome: Outcome) -> list[float]:
    """Returns, for each bin of confidence, its confidence, correctness and count; then 1."""
    share = probabilities(outcome.likelihoods)
    confidence, right = float(share.max()), float(_best(outcome.likelihoods) == outcome.gold)
    sums = np.zeros((ECE_BINS, 3))
    sums[min(ECE_BINS - 1, int(confidence * ECE_BINS))] = confidence, right, 1.0
    return [*sums.reshape(-1).tolist(), 1.0]


def calibration_error(sums: Floats) -> Floats:
    """Returns the expected calibration error of summed statistics, [R, 31] -> [R].

    Σ_b |correct_b - confidence_b| / n over 10 bins of equal width (Guo et al. 2017, arXiv
    1706.04599, eq. 3); the confidence is the probability of the best choice among the choices.
    """
    bins = sums[:, :-1].reshape(len(sums), ECE_BINS, 3)
    found: Floats = np.abs(bins[:, :, 1] - bins[:, :, 0]).sum(1) / sums[:, -1]
    return found


def _best(values: tuple[float, ...]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _chars(text: str) -> int:
    return len(text)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _normalized(outcome: Outcome, length: Callable[[str], int]) -> float:
    lengths = [max(1, length(choice)) for choice in outcome.choices]
    values = tuple(v / n for v, n in zip(outcome.likelihoods, lengths, strict=True))
    return float(_best(values) == outcome.gold)


def _text_metric(name: str, unit: int, *, exponential: bool) -> Metric:
    """Returns a metric of the loss per token (unit 1), byte (2) or word (3)."""

    def value(sums: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            loss = sums[:, 0] / sums[:, unit]
            found: Floats = np.exp(loss) if exponential else loss / math.log(2)
            return found

    return Metric(
        name=name,
        needs="nats",
        statistics=lambda o: (o.nats, o.tokens, o.bytes, o.words),
        value=value,
        is_mean=False,
        lower_is_better=True,
    )


__all__ = [
    "calibration_error",
    "calibration_statistics",
    "choice_of",
    "likelihood_metrics",
    "probabilities",
]
