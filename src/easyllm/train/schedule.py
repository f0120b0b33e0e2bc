"""Learning-rate schedules: pure functions of the step."""

import math

from easyllm.train.config import CosineConfig


def rate_factor(config: CosineConfig, step: int, total_steps: int) -> float:
    """The factor on the peak rate for optimizer step `step`, counted from 0.

    Warm-up rises linearly and reaches 1 at its last step; the cosine falls to `floor` at the last step.

    >>> [round(rate_factor(CosineConfig(warmup_ratio=0.25), s, 8), 3) for s in range(8)]
    [0.5, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067, 0.0]
    """
    warmup = round(config.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup + 1) / max(1, total_steps - warmup)
    return config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
