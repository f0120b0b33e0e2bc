"""Reports how long `torch.compile` has taken."""

import statistics

from easyllm.train.training_run import Callback, Run, StepReport

COMPILING, SETTLED = 5, 3
"""Number of first steps in which `torch.compile` may still compile, and of the steps after them
that measure the usual step time."""


class CompileTime(Callback):
    """Reports the extra time of the first steps of a compiled model, once the step time settles.

    Compilation happens inside the first steps, so it cannot be timed separately.
    """

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._is_reported = False

    def after_step(self, run: Run, report: StepReport) -> None:
        """Collects the time of the first steps."""
        if self._is_reported:
            return
        self._seconds.append(report.seconds)
        if len(self._seconds) < COMPILING + SETTLED:
            return
        self._is_reported = True
        first, usual = self._seconds[:COMPILING], statistics.median(self._seconds[COMPILING:])
        extra = sum(first) - COMPILING * usual
        run.event(
            "compiled",
            f"in total, the first {COMPILING} steps took {extra:.1f} s longer than later steps, "
            f"which take {usual:.2f} s each",
        )


__all__ = ["COMPILING", "SETTLED", "CompileTime"]
