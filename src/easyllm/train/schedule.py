"""Learning-rate schedules, as pure functions of the step.

Steps are counted as in `transformers` (`get_cosine_schedule_with_warmup` and the like), so that the
curves of both coincide: the first warm-up step has rate 0, the first step after the warm-up has the
peak rate, and the decay would reach its floor one step after the last step. Two things differ:
`floor` bounds the decay only (`get_wsd_schedule` also starts the warm-up there), and a single-step
run ignores the warm-up ratio (it would train at rate 0).
"""

import math

from easyllm.train.optim_config import (
    ConstantConfig,
    CosineConfig,
    InverseSqrtConfig,
    LinearConfig,
    Schedule,
    WarmupStableDecayConfig,
)

UNWARMED_TIMESCALE = 10_000
"""The w of √(w / (step + w)) without a warm-up, as in `transformers`."""


def rate_factor(schedule: Schedule, step: int, total_steps: int) -> float:
    """Returns the factor on the peak learning rate for optimizer step `step`, counted from 0.

    >>> from easyllm.train.config import CosineConfig
    >>> [round(rate_factor(CosineConfig(warmup_ratio=0.25), s, 8), 3) for s in range(8)]
    [0.0, 0.5, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067]
    """
    warmup = warmup_steps(schedule, total_steps)
    if step < warmup:
        return step / warmup
    match schedule:
        case ConstantConfig():
            return 1.0
        case InverseSqrtConfig():
            timescale = warmup or UNWARMED_TIMESCALE
            return math.sqrt(timescale / (step - warmup + timescale))
        case LinearConfig():
            fall = 1 - _share(step, warmup, total_steps)
        case CosineConfig():
            fall = _half_cosine(_share(step, warmup, total_steps))
        case WarmupStableDecayConfig():
            start = max(warmup, total_steps - math.ceil(schedule.decay_ratio * total_steps))
            progress = _share(step, start, total_steps) if step >= start else 0.0
            match schedule.shape:
                case "linear":
                    fall = 1 - progress
                case "cosine":
                    fall = _half_cosine(progress)
                case "sqrt":
                    fall = 1 - math.sqrt(progress)
    return schedule.floor + (1 - schedule.floor) * fall


def warmup_steps(schedule: Schedule, total_steps: int) -> int:
    """Returns the number of warm-up steps; a ratio is rounded up, as in `transformers`."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    return math.ceil(schedule.warmup_ratio * total_steps) if total_steps > 1 else 0


def _share(step: int, start: int, end: int) -> float:
    """Returns the progress of `step` from `start` to `end`, in [0, 1]."""
    return min(1.0, (step - start) / max(1, end - start))


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))
