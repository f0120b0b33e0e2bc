"""Figures of a text and the bounds a rule sets them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

Fraction = Annotated[float, Field(ge=0, le=1)]
"""A share of something, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken bound: the rule's full name (`gopher_quality.mean_word_length`) and the figure that broke it."""

    rule: str
    value: float | str


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement of a text and the closed interval it must lie in; None leaves a side open."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_within(self) -> bool:
        return (self.low is None or self.value >= self.low) and (
            self.high is None or self.value <= self.high
        )


def first_violation(kind: str, figures: Iterable[Figure]) -> Violation | None:
    """The first figure out of its bounds, or None; figures after it are never computed."""
    for figure in figures:
        if not figure.is_within:
            return Violation(f"{kind}.{figure.name}", figure.value)
    return None


def ratio(part: float, whole: float) -> float:
    """`part / whole`, and 0 where there is no whole (an empty text)."""
    return part / whole if whole else 0.0


def check_order(name: str, low: float | None, high: float | None) -> None:
    """Raises ValueError where no text could satisfy both bounds."""
    if low is not None and high is not None and low > high:
        raise ValueError(f"min_{name}={low} is above max_{name}={high}; no text can satisfy both")
