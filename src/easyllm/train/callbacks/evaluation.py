"""Evaluates during and at the end of a run, and stops a run that no longer improves."""

import math
from collections.abc import Mapping

from easyllm.core.json_types import JsonObject
from easyllm.train.callbacks.checkpoints import restore_best
from easyllm.train.config import EarlyStoppingConfig
from easyllm.train.training_run import Callback, Run, StepReport


class Evaluation(Callback):
    """Evaluates every `eval_every` steps and at the end; adds the last metrics to the results.

    With `keep_best`, the weights with the lowest evaluation loss are restored at the end, and it
    is their metrics that are added.
    """

    def __init__(self) -> None:
        self._evaluated_step = -1
        self._figures: dict[str, float] = {}

    def on_start(self, run: Run) -> None:
        """Evaluates a new run's model before the first step, if the objective asks for it."""
        if run.objective.evaluates_start and run.config.eval_every and run.progress.step == 0:
            self._evaluate(run)

    def after_step(self, run: Run, report: StepReport) -> None:
        """Evaluates if it is due; the last step is evaluated in `on_end`."""
        if run.is_due(run.config.eval_every) and report.step != run.total_steps:
            self._evaluate(run)

    def on_end(self, run: Run, results: JsonObject) -> None:
        """Evaluates the weights that are saved as the result."""
        self._evaluate(run)
        if run.config.keep_best:
            best_step = restore_best(run)
            if best_step is not None:
                results["best_step"] = best_step
                self._figures = run.evaluate()
        results.update({k.replace("eval/", "eval_"): v for k, v in self._figures.items()})

    def _evaluate(self, run: Run) -> None:
        """Evaluates the current step, unless that was done before."""
        if run.progress.step == self._evaluated_step:
            return
        self._evaluated_step = run.progress.step
        self._figures = run.evaluate()
        if self._figures:
            for callback in run.callbacks:
                callback.on_evaluate(run, self._figures)


class EarlyStopping(Callback):
    """Stops a run whose evaluation loss has not fallen for `patience` evaluations.

    Args:
        config: the patience, and the minimum decrease that counts.
    """

    def __init__(self, config: EarlyStoppingConfig) -> None:
        self.config = config

    def on_evaluate(self, run: Run, figures: Mapping[str, float]) -> None:
        """Counts evaluations without improvement; the last step's has nothing to stop."""
        progress, loss = run.progress, run.objective.monitored(figures)
        bound = math.inf if progress.stopping_loss_nats is None else progress.stopping_loss_nats
        if loss < bound - self.config.min_delta:
            progress.stopping_loss_nats, progress.patience_used = loss, 0
            return
        progress.patience_used = (progress.patience_used or 0) + 1
        if progress.patience_used >= self.config.patience and progress.step < run.total_steps:
            progress.stopped = (
                f"the evaluation loss has not fallen for {self.config.patience} evaluations"
            )


__all__ = ["EarlyStopping", "Evaluation"]
