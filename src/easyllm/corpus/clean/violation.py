"""Metrics of a text and the bounds that a rule places on them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

Fraction = Annotated[float, Field(ge=0, le=1)]
"""A ratio from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A violated bound.

    Attributes:
        rule: full name of the rule, such as `gopher_quality.mean_word_length`.
        value: the value of the metric that violates the bound.
    """

    rule: str
    value: float | str


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of a text and the closed interval it must be in; None means unbounded."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_within(self) -> bool:
        """Whether the value is within its bounds."""
        return (self.low is None or self.value >= self.low) and (
            self.high is None or self.value <= self.high
        )


def first_violation(kind: str, figures: Iterable[Metric]) -> Violation | None:
    """Returns the first metric that is out of bounds, or None; later metrics are not computed.

    Args:
        kind: the rule's name, which is prefixed to that of the metric.
        figures: the metrics, lazily computed.
    """
    for figure in figures:
        if not figure.is_within:
            return Violation(f"{kind}.{figure.name}", figure.value)
    return None


def ratio(part: float, whole: float) -> float:
    """Returns `part / whole`, or 0 if `whole` is 0 (an empty text)."""
    return part / whole if whole else 0.0


def check_order(name: str, low: float | None, high: float | None) -> None:
    """Raises ValueError if no text could satisfy both bounds."""
    if low is not None and high is not None and low > high:
        raise ValueError(f"min_{name}={low} is above max_{name}={high}; no text can satisfy both")
