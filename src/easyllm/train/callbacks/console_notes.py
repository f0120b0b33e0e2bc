"""Prints evaluations and events to the console."""

from collections.abc import Mapping

from easyllm.core.progress import console
from easyllm.train.training_run import Callback, Run


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


__all__ = ["ConsoleNotes"]
