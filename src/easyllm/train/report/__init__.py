"""A run's page, `report.html`: curves, totals, events and samples, in one file that opens from disk.

It is drawn from `recipe.yaml`, `metrics.jsonl` and `manifest.json` alone, so it can be made while the run goes on, after it,
or on another machine. Curves are SVG made here; the script only adds a crosshair and reads the page again while it grows.

    metrics.jsonl → History, a series a name → Chart, which series together → figure, two points a column of pixels
"""

from pathlib import Path

from easyllm.core.atomic import write_atomic
from easyllm.core.errors import SourceError
from easyllm.core.run_folder import RECIPE_FILE
from easyllm.train.metrics import FILE as METRICS_FILE
from easyllm.train.report.history import History, read_facts
from easyllm.train.report.page import build_page

REPORT_FILE = "report.html"


def write_report(run: Path, *, total_steps: int | None = None) -> Path:
    """The path of `report.html`, made new from what lies in the run's folder.

    Args:
        total_steps: where the run will end, if that is known.

    Raises:
        SourceError: `run` holds no run.
        OutputError: the page cannot be written.
    """
    return RunReport(run, total_steps=total_steps).write()


class RunReport:
    """The page of a run that goes on: each `write` reads only the lines of `metrics.jsonl` that are new.

    Example:
        report = RunReport(run, total_steps=1000)
        report.write()  # now and then
    """

    def __init__(self, run: Path, *, total_steps: int | None = None) -> None:
        self.run, self.total_steps = run, total_steps
        self._history = History(run / METRICS_FILE)

    def write(self) -> Path:
        """The path of the page. Raises as `write_report`."""
        if not any((self.run / name).is_file() for name in (RECIPE_FILE, METRICS_FILE)):
            raise SourceError(
                f"{str(self.run)!r} holds neither {RECIPE_FILE} nor {METRICS_FILE}; name the folder of a training run"
            )
        self._history.update()
        target = self.run / REPORT_FILE
        write_atomic(target, build_page(read_facts(self.run, self._history, self.total_steps)))
        return target


__all__ = ["REPORT_FILE", "RunReport", "write_report"]
