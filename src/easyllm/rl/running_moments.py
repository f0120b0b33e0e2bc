"""Running mean and variance of rewards over all rollouts of a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of all values seen (Chan et al. 1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, values: Sequence[float]) -> None:
        """Adds values."""
        if not values:
            return
        number, mean = len(values), sum(values) / len(values)
        squares = sum((value - mean) ** 2 for value in values)
        total, shift = self.count + number, mean - self.mean
        self.squares += squares + shift**2 * self.count * number / total
        self.mean += shift * number / total
        self.count = total

    @property
    def std(self) -> float:
        """The sample standard deviation; 1 with fewer than two values or without variance."""
        if self.count < 2 or self.squares <= 0:
            return 1.0
        return math.sqrt(self.squares / (self.count - 1))


__all__ = ["RunningMoments"]
