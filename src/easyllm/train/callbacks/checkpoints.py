"""Writes the checkpoints of a run: those to resume from, and the best."""

import math
from collections.abc import Mapping

from easyllm.train.background_save import BackgroundSave
from easyllm.train.state import BEST, FOLDER, load_state, save_state, save_step
from easyllm.train.training_run import Callback, Run, StepReport


class Checkpoints(Callback):
    """Writes a checkpoint every `save_every` steps, and whenever a run stops.

    It comes last of a run's callbacks, so that a checkpoint contains what the others decided in
    its step, such as the reason to stop.
    """

    def __init__(self) -> None:
        self._saved_step = -1
        self._writing: BackgroundSave | None = None

    def after_step(self, run: Run, report: StepReport) -> None:
        """Saves if it is due, after the last step and when the run stops early."""
        writing, self._writing = self._writing, None
        if writing is not None and not writing.advance():
            self._writing = writing
        is_end = report.step == run.total_steps or run.progress.stopped is not None
        if run.config.save_every and (is_end or run.is_due(run.config.save_every)):
            self._save(run)
        if is_end:
            self._finish()

    def on_interrupt(self, run: Run) -> None:
        """Saves, so that the run can be resumed."""
        self._save(run)
        self._finish()

    def close(self, run: Run) -> None:
        """Ends a write that an error has interrupted; other ranks may no longer answer."""
        writing, self._writing = self._writing, None
        if writing is not None and run.parallel is None:
            writing.finish()
        elif writing is not None:
            writing.abandon()

    def _finish(self) -> None:
        """Waits until the checkpoint that is being written is complete."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.finish()

    def _save(self, run: Run) -> None:
        """Writes a checkpoint of this step, unless it exists or a weight is NaN or infinite."""
        if run.progress.step == self._saved_step:
            return
        if not run.is_finite():
            run.event("not saved", "a weight is NaN or infinite; keeping the last good checkpoint")
            return
        self._finish()
        if run.config.save_async:
            self._writing = BackgroundSave(run.output, run.state, keep_last=run.config.keep_last)
        else:
            save_step(run.output, run.state, keep_last=run.config.keep_last)
        self._saved_step = run.progress.step


class BestCheckpoint(Callback):
    """Tracks the lowest evaluation loss; with `keep_best`, saves its checkpoint."""

    def on_evaluate(self, run: Run, figures: Mapping[str, float]) -> None:
        """Compares the evaluation with the best so far."""
        progress, loss = run.progress, run.objective.monitored(figures)
        if loss < (math.inf if progress.best_loss_nats is None else progress.best_loss_nats):
            progress.best_loss_nats, progress.best_step = loss, progress.step
            if run.config.keep_best:
                save_state(run.output / FOLDER / BEST, run.state)


def restore_best(run: Run) -> int | None:
    """Restores the weights with the lowest evaluation loss.

    Returns:
        The step of these weights; None if there is no such checkpoint.
    """
    folder = run.output / FOLDER / BEST
    if not folder.is_dir():
        return None
    load_state(folder, run.state)
    run.finish_adapter()
    return run.progress.step


__all__ = ["BestCheckpoint", "Checkpoints", "restore_best"]
