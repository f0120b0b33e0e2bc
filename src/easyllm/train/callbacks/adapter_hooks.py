"""Calls the training hooks of the adapter being trained."""

from easyllm.adapters import StepInfo
from easyllm.train.training_run import Callback, Run, StepReport


class AdapterHooks(Callback):
    """Passes each backward pass and each optimizer step to the run's `AdapterSet`.

    The hooks of a method with state beyond its modules, such as a rank budget, depend on them.
    Skipped steps are not passed on: they change no parameter.
    """

    def after_backward(self, run: Run, info: StepInfo) -> None:
        """Calls `AdapterSet.after_backward`."""
        if run.adapters is not None:
            run.adapters.after_backward(info)

    def after_step(self, run: Run, report: StepReport) -> None:
        """Calls `AdapterSet.after_step`, unless the step was skipped."""
        if run.adapters is None or report.skipped:
            return
        run.adapters.after_step(
            StepInfo(
                step=report.step,
                total_steps=run.total_steps,
                gradient_scale=report.gradient_scale,
            )
        )


__all__ = ["AdapterHooks"]
