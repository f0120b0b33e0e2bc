"""Statistics of a load test: rates, and quantiles of latencies."""

import math
import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from easyllm.core.json_types import JsonObject

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(slots=True)
class Answer:
    """The course of one request; times are readings of `time.perf_counter()`.

    Attributes:
        start_s: when it was sent.
        end_s: when the response was complete, or the request had failed.
        first_s: when the first text arrived; None if none did.
        last_s: when the last text arrived.
        gaps_s: times between successive chunks with text.
        chunks: number of chunks with text.
        prompt_tokens, cached_tokens, completion_tokens: as the server counts them; None if it does
            not.
        error: kind of the failure; None for an answered request.
        detail: the failure in the server's words.
    """

    start_s: float
    end_s: float = 0.0
    first_s: float | None = None
    last_s: float = 0.0
    gaps_s: "array[float]" = field(default_factory=lambda: array("d"))
    chunks: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    detail: str = ""

    @property
    def output_tokens(self) -> int:
        """Generated tokens; the number of chunks if the server does not count tokens."""
        return self.chunks if self.completion_tokens is None else self.completion_tokens


@dataclass(slots=True)
class Run:
    """The answers to one load.

    Attributes:
        start_s, end_s: when the first request was sent, and when the last one ended.
        answers: in the order in which they ended.
        late_s: by how much each request was sent after its time of arrival (open loop).
        cpu_s: processor time of this process.
        num_unanswered: requests still open when the run was interrupted.
    """

    start_s: float
    end_s: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    num_unanswered: int = 0

    def summary(self) -> JsonObject:
        """Returns rates, latencies and errors; times in seconds, null where nothing was measured.

        Failed requests count among the errors only.
        """
        good = [answer for answer in self.answers if answer.error is None]
        seconds = max(self.end_s - self.start_s, 1e-9)
        output = sum(answer.output_tokens for answer in good)
        prompts = [a.prompt_tokens for a in good if a.prompt_tokens is not None]
        counted = all(answer.completion_tokens is not None for answer in good)
        return {
            "requests": len(self.answers),
            "answered": len(good),
            "errors": errors_of(self.answers),
            "unanswered": self.num_unanswered,
            "seconds": seconds,
            "requests_per_s": len(good) / seconds,
            "output_tokens_per_s": output / seconds,
            "total_tokens_per_s": (
                (output + sum(prompts)) / seconds if len(prompts) == len(good) else None
            ),
            "tokens_counted_by": "usage" if counted else "chunks",
            "chunks_per_output_token": sum(a.chunks for a in good) / output if output else None,
            "prompt_tokens": span(prompts),
            "cached_tokens": _total(a.cached_tokens for a in good),
            "output_tokens": span([answer.output_tokens for answer in good]),
            "first_token_s": quantiles([a.first_s - a.start_s for a in good if a.first_s]),
            "inter_token_s": quantiles([gap for answer in good for gap in answer.gaps_s]),
            "latency_s": quantiles([answer.end_s - answer.start_s for answer in good]),
            "without_text": sum(answer.first_s is None for answer in good),
            "mean_open_requests": sum(a.end_s - a.start_s for a in self.answers) / seconds,
            "sent_late_s": quantiles(self.late_s),
            "client_cpu_share": self.cpu_s / seconds,
        }


def quantiles(values: Sequence[float]) -> JsonObject | None:
    """Returns mean, p50, p95 and p99 of some numbers; None if there are none.

    Between two neighbouring values, quantiles are interpolated linearly.

    >>> quantiles([1.0, 2.0, 3.0])["p50"]
    2.0
    """
    if not values:
        return None
    ordered = sorted(values)
    found = {name: _quantile(ordered, share) for name, share in QUANTILES.items()}
    return {"mean": statistics.fmean(ordered), **found}


def span(values: Sequence[int]) -> JsonObject | None:
    """Returns mean, minimum and maximum of some numbers; None if there are none."""
    if not values:
        return None
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def errors_of(answers: Iterable[Answer]) -> JsonObject:
    """Returns the number of failures and an example of each kind, the most frequent first."""
    failed = [answer for answer in answers if answer.error is not None]
    examples = {answer.error: answer.detail for answer in reversed(failed)}
    counts = Counter(answer.error for answer in failed)
    return {
        str(kind): {"count": count, "example": examples[kind]}
        for kind, count in counts.most_common()
    }


def _total(values: Iterable[int | None]) -> int | None:
    """Returns the sum of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
