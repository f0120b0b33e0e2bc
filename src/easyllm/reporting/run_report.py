"""The HTML report of a run, `report.html`: curves, totals, events and samples in a single file.

It is generated from `recipe.yaml`, `metrics.jsonl` and `manifest.json` alone, during the run,
afterwards or on another machine, and can be opened directly from disk. Curves are rendered to SVG
here; the page's script only adds a crosshair and reloads the page while the run continues.

    metrics.jsonl → History: one series per metric → Chart: series plotted together
                  → figure: SVG with two points per pixel column
"""

from collections.abc import Callable
from pathlib import Path

from easyllm.core.atomic import write_atomic
from easyllm.core.errors import SourceError
from easyllm.core.json_types import JsonObject
from easyllm.core.run_folder import RECIPE_FILE
from easyllm.reporting.history import History, read_facts
from easyllm.reporting.page import build_page
from easyllm.train.metrics import FILE as METRICS_FILE

REPORT_FILE = "report.html"


def write_report(
    run: Path,
    *,
    total_steps: int | None = None,
    diagnose: Callable[[Path], JsonObject] | None = None,
) -> Path:
    """Generates `report.html` from the files in the run's folder; returns its path.

    Args:
        run: the run's folder.
        total_steps: number of steps of the complete run, if known.
        diagnose: says what is unusual in a run, such as `easyllm.rl.doctor.report`.

    Raises:
        SourceError: `run` is not the folder of a run.
        OutputError: the page cannot be written.
    """
    return RunReport(run, total_steps=total_steps, diagnose=diagnose).write()


class RunReport:
    """The report of a run in progress; each `write` reads only the new lines of `metrics.jsonl`.

    Args:
        run: the run's folder.
        total_steps: number of steps of the complete run, if known.
        diagnose: says what is unusual in a run, as JSON values; None leaves that section out.

    Example:
        report = RunReport(run, total_steps=1000)
        report.write()  # repeatedly
    """

    def __init__(
        self,
        run: Path,
        *,
        total_steps: int | None = None,
        diagnose: Callable[[Path], JsonObject] | None = None,
    ) -> None:
        self.run, self.total_steps, self.diagnose = run, total_steps, diagnose
        self._history = History(run / METRICS_FILE)

    def write(self) -> Path:
        """Writes the report and returns its path; raises the errors of `write_report`."""
        if not any((self.run / name).is_file() for name in (RECIPE_FILE, METRICS_FILE)):
            raise SourceError(
                f"{str(self.run)!r} contains neither {RECIPE_FILE} nor {METRICS_FILE}; "
                "give the folder of a training run"
            )
        self._history.update()
        target = self.run / REPORT_FILE
        facts = read_facts(self.run, self._history, self.total_steps, self.diagnose)
        write_atomic(target, build_page(facts))
        return target


__all__ = ["REPORT_FILE", "RunReport", "write_report"]
