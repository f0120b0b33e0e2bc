"""Logs a run: steps, evaluations, samples and events to `metrics.jsonl`, some to the console."""

from collections.abc import Mapping

from easyllm.core.json_types import JsonMapping
from easyllm.core.progress import console
from easyllm.train.metrics import MetricsLog
from easyllm.train.training_run import Callback, Run, StepReport


class LogMetrics(Callback):
    """Logs to `metrics.jsonl`; of a resumed run, lines after the checkpoint are dropped."""

    def __init__(self) -> None:
        self._log: MetricsLog | None = None

    def on_start(self, run: Run) -> None:
        """Opens the file."""
        self._log = MetricsLog(run.output, after_step=run.progress.step)

    def after_step(self, run: Run, report: StepReport) -> None:
        """Logs the step, every `log_every` steps."""
        if run.is_logged:
            self._write(run.figures(report))

    def on_evaluate(self, run: Run, figures: Mapping[str, float]) -> None:
        """Logs the evaluation."""
        self._write({"step": run.progress.step, **figures})

    def on_retention(self, run: Run, loss_nats: float) -> None:
        """Logs the loss on the retention set."""
        self._write({"step": run.progress.step, "retention/loss_nats": loss_nats})

    def on_samples(self, run: Run, samples: list[dict[str, str]]) -> None:
        """Logs sample completions."""
        self._write({"step": run.progress.step, "samples": samples})

    def on_event(self, run: Run, kind: str, detail: str) -> None:
        """Logs the event."""
        self._write({"step": run.progress.step, "event": kind, "detail": detail})

    def close(self, run: Run) -> None:  # noqa: ARG002 - of the interface
        """Closes the file."""
        if self._log is not None:
            self._log.close()

    def _write(self, figures: JsonMapping) -> None:
        assert self._log is not None, "the run has started"
        self._log.write(**figures)


class ConsoleNotes(Callback):
    """Prints one line for each evaluation and event; steps are shown by the progress line."""

    def on_evaluate(self, run: Run, figures: Mapping[str, float]) -> None:
        """Prints the metrics of an evaluation."""
        shown = ", ".join(f"{name.removeprefix('eval/')} {v:.4f}" for name, v in figures.items())
        console().print(f"step {run.progress.step}: {shown}", soft_wrap=True)

    def on_event(self, run: Run, kind: str, detail: str) -> None:
        """Prints an event; its text may contain square brackets."""
        line = f"step {run.progress.step}: {kind}: {detail}"
        console().print(line, soft_wrap=True, markup=False)


__all__ = ["ConsoleNotes", "LogMetrics"]
