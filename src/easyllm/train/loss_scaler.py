"""Dynamic loss scaling for fp16, in which small gradients would underflow to zero.

See Micikevicius et al. 2017, arXiv 1710.03740, §3.2. The loss is multiplied by a scale before the
backward pass, and the gradients are divided by it afterwards. A NaN or infinite gradient means that
the scale was too large; the step is then skipped.
"""

from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonMapping, JsonObject


class LossScaler:
    """The dynamic loss scale, with exactly DeepSpeed's update rule (version 0.17.1 and later).

    - Each overflow uses up one unit of `hysteresis`. Once a single unit remains, every overflow
      divides the scale by `factor`.
    - After `window` consecutive steps without overflow, the next such step multiplies the scale by
      `factor`, as does every `window`-th one after it. Only this restores the full hysteresis;
      with `consecutive_hysteresis`, every step without overflow does.

    Args:
        initial_scale: initial value, 2 to the power of DeepSpeed's `initial_scale_power`.
        window: consecutive steps without overflow before the scale is raised.
        hysteresis: number of overflows up to and including the first that lowers the scale.
        min_scale: lower bound of the scale.
        factor: factor by which the scale is raised or lowered.
        consecutive_hysteresis: whether every step without overflow restores the hysteresis.

    Attributes:
        scale: the factor on the next step's loss.

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
        """Updates the scale after a step; returns whether the step must be skipped.

        Args:
            overflow: whether a gradient of the step is NaN or infinite.

        Raises:
            ConfigError: the gradients overflow even at the minimum scale.
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
                f"the gradients overflow fp16 even at the minimum loss scale, {self.min_scale:g}; "
                "train with precision=bf16 or fp32, or lower the learning rate"
            )
        self.scale = max(self.scale / self.factor, self.min_scale)

    def state(self) -> JsonObject:
        """Returns the state to store in a checkpoint, as JSON-compatible values."""
        return {
            "scale": self.scale,
            "overflows_left": self._overflows_left,
            "clean_steps": self._clean_steps,
        }

    def load_state(self, state: JsonMapping | None) -> None:
        """Restores the state that `state` returned; None (a new run) changes nothing."""
        if state is not None:
            self.scale = float(state["scale"])
            self._overflows_left = int(state["overflows_left"])
            self._clean_steps = int(state["clean_steps"])
