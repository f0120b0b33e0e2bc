"""Callbacks that report a training run while it runs."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from easyllm.core.json_types import JsonObject
from easyllm.reporting.expected import load_band
from easyllm.reporting.expected_callback import ExpectedBand
from easyllm.reporting.run_report import RunReport
from easyllm.reporting.tensorboard import TensorBoardWriter
from easyllm.train.config import TrainConfig
from easyllm.train.training_run import Callback, Run, StepReport

REPORT_EVERY_S = 15.0
"""Minimum time between two versions of the page, in seconds."""
FOLDER = "tensorboard"


def reporting_callbacks(
    config: TrainConfig,
    recipe: str | None = None,
    *,
    root: Path | None = None,
    diagnose: Callable[[Path], JsonObject] | None = None,
) -> tuple[Callback, ...]:
    """Returns the callbacks that write the reports which a recipe configures.

    These are `report.html`, always, the files for TensorBoard with `tensorboard: true`, and the
    comparison with the recipe's band.

    Args:
        config: the configuration.
        recipe: name of the shipped recipe that it comes from, or RECIPE/STAGE; None for a recipe of
            the user's.
        root: the output folder of the recipe, if this is one of its stages.
        diagnose: says what is unusual in a run, such as `easyllm.rl.doctor.report`; the page then
            shows it.

    Raises:
        DataError: the file of the recipe's band is damaged.
    """
    found: list[Callback] = [WriteReport(diagnose)]
    if config.tensorboard:
        found.append(TensorBoard())
    band = None if recipe is None else load_band(recipe)
    if band is not None:
        found.append(ExpectedBand(band, root))
    return tuple(found)


class WriteReport(Callback):
    """Writes `report.html` at most every `REPORT_EVERY_S` seconds, and when the run ends."""

    def __init__(self, diagnose: Callable[[Path], JsonObject] | None = None) -> None:
        self._diagnose = diagnose
        self._report: RunReport | None = None
        self._written_at = 0.0

    def on_start(self, run: Run) -> None:
        """Starts the time until the first version of the page."""
        self._report = RunReport(run.output, total_steps=run.total_steps, diagnose=self._diagnose)
        self._written_at = time.monotonic()

    def after_step(self, run: Run, report: StepReport) -> None:  # noqa: ARG002 - of the interface
        """Writes the page if it is due."""
        if self._report is not None and time.monotonic() - self._written_at > REPORT_EVERY_S:
            self._report.write()
            self._written_at = time.monotonic()

    def close(self, run: Run) -> None:  # noqa: ARG002 - of the interface
        """Writes the page of a run that has finished, stopped or failed."""
        if self._report is not None:
            self._report.write()


class TensorBoard(Callback):
    """Writes logged steps and evaluations to the run's folder `tensorboard`."""

    implements = ("tensorboard",)

    def __init__(self) -> None:
        self._writer: TensorBoardWriter | None = None

    def on_start(self, run: Run) -> None:
        """Opens an event file; a resumed run's later steps in earlier files are discarded."""
        self._writer = TensorBoardWriter(run.output / FOLDER, after_step=run.progress.step)

    def after_step(self, run: Run, report: StepReport) -> None:
        """Writes the metrics of a logged step."""
        if run.is_logged:
            figures = run.figures(report)
            self._write(run, {k: v for k, v in figures.items() if k != "step"})

    def on_evaluate(self, run: Run, figures: Mapping[str, float]) -> None:
        """Writes the metrics of an evaluation."""
        self._write(run, figures)

    def close(self, run: Run) -> None:  # noqa: ARG002 - of the interface
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, run: Run, values: Mapping[str, float]) -> None:
        assert self._writer is not None, "the run has started"
        self._writer.write(run.progress.step, time.time(), values)


__all__ = ["TensorBoard", "WriteReport", "reporting_callbacks"]
