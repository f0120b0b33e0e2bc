"""Dynamic loss scaling for fp16, whose small gradients would vanish (Micikevicius et al. 2017, arXiv 1710.03740, §3.2).

The loss is multiplied by a scale before the backward pass and the gradients divided by it after. A gradient that is no
number means the scale was too large: the step is skipped.
"""

from collections.abc import Mapping
from typing import Any

from easyllm.core.errors import ConfigError


class LossScaler:
    """The scale, and the rule that moves it: DeepSpeed's (version 0.17.1 and later), step for step.

    - An overflow uses up one of the `hysteresis` allowed; from the last one on it divides the scale by `factor`.
    - `window` clean steps in a row, then one more, multiply the scale by `factor`, and again every `window` steps;
      only that gives the hysteresis back (or any clean step does, where it is `consecutive_hysteresis`).

    Args:
        initial_scale: 2^16, or 2 to the power of DeepSpeed's `initial_scale_power`.
        min_scale: the least the scale may fall to.

    Attributes:
        scale: what the next step's loss is multiplied by.

    >>> scaler = LossScaler(initial_scale=8.0, window=2, hysteresis=2)
    >>> [(scaler.update(overflow), scaler.scale) for overflow in (True, True, False, False, False)]
    [(True, 8.0), (True, 4.0), (False, 4.0), (False, 4.0), (False, 8.0)]
    """

    def __init__(
        self,
        *,
        initial_scale: float = 2.0**16,
        window: int = 1000,
        hysteresis: int = 2,
        min_scale: float = 1.0,
        factor: float = 2.0,
        consecutive_hysteresis: bool = False,
    ) -> None:
        self.scale = initial_scale
        self.window, self.hysteresis = window, hysteresis
        self.min_scale, self.factor = min_scale, factor
        self.consecutive_hysteresis = consecutive_hysteresis
        self._overflows_left = hysteresis
        self._clean_steps = 0

    def update(self, overflow: bool) -> bool:
        """Takes in whether this step's gradients overflowed; returns whether the step must be skipped.

        Raises:
            ConfigError: they overflow at the least scale.
        """
        if overflow:
            self._clean_steps = 0
            self._lower()
            return True
        if self._clean_steps and self._clean_steps % self.window == 0:
            self.scale *= self.factor
            self._overflows_left = self.hysteresis
        if self.consecutive_hysteresis:
            self._overflows_left = self.hysteresis
        self._clean_steps += 1
        return False

    def _lower(self) -> None:
        if self._overflows_left > 1:
            self._overflows_left -= 1
            return
        if self.scale <= self.min_scale:
            raise ConfigError(
                f"the gradients overflow fp16 even at the least loss scale, {self.min_scale:g}; "
                "train with precision=bf16 or fp32, or lower the learning rate"
            )
        self.scale = max(self.scale / self.factor, self.min_scale)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON can hold it."""
        return {
            "scale": self.scale,
            "overflows_left": self._overflows_left,
            "clean_steps": self._clean_steps,
        }

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Takes back what `state` gave; None, of a run that has none yet, changes nothing."""
        if state is not None:
            self.scale = float(state["scale"])
            self._overflows_left = int(state["overflows_left"])
            self._clean_steps = int(state["clean_steps"])
