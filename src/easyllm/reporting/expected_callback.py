"""Says at each evaluation, and at the end, whether a run is inside its recipe's band."""

from collections.abc import Mapping
from pathlib import Path

from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.core.progress import console
from easyllm.reporting.expected import BY_STEP, DEFINING, LOSS, MEMORY, NORM, SPEED, Band, Watch
from easyllm.reporting.expected import changes as changes_of
from easyllm.reporting.likely_causes import Symptoms, likely_causes
from easyllm.train.training_run import Callback, Run, StepReport

NAMES = {
    LOSS: "loss",
    NORM: "gradient norm",
    SPEED: "share of the matmul rate",
    MEMORY: "peak memory",
}


class ExpectedBand(Callback):
    """Compares a run with the band of its recipe.

    Args:
        band: the band.
        root: the folder of the recipe that this training is a stage of; None if it is not one.
    """

    def __init__(self, band: Band, root: Path | None = None) -> None:
        self._band, self._root = band, root
        self._watch: Watch | None = None
        self._skipped = 0
        self._said: str | None = None

    def on_start(self, run: Run) -> None:
        """Starts to watch, unless the run is resumed: the steps before are not known then."""
        self._watch = Watch(self._band) if run.progress.step == 0 else None

    def after_step(self, run: Run, report: StepReport) -> None:
        """Notes the metrics of the step."""
        if self._watch is not None:
            self._watch.add(run.figures(report))
            self._skipped += report.skipped

    def on_evaluate(self, run: Run, figures: Mapping[str, float]) -> None:  # noqa: ARG002
        """Prints whether the run is inside the band."""
        self._say(run)

    def on_end(self, run: Run, results: JsonObject) -> None:  # noqa: ARG002
        """Prints the same at the end, unless nothing has changed."""
        self._say(run)

    def _say(self, run: Run) -> None:
        if self._watch is None:
            return
        config = run.config.model_dump(mode="json")
        lines = verdict(self._watch, config, skipped=self._skipped, root=self._root)
        text = "\n".join(lines)
        if lines and text != self._said:
            self._said = text
            for line in lines:
                console().print(f"step {run.progress.step}: {line}", soft_wrap=True, markup=False)


def verdict(
    watch: Watch, config: JsonMapping, *, skipped: int = 0, root: Path | None = None
) -> list[str]:
    """Returns what to say about a run: one line inside the band, else the causes too.

    Args:
        watch: the run so far.
        config: its configuration.
        skipped: steps that changed nothing.
        root: as for `ExpectedBand`.
    """
    changed = changes_of(config, watch.band, root)
    sides = watch.sides()
    if any(key.split(".")[0] in DEFINING and key != "data.train_on" for key, _, _ in changed):
        sides = {name: side for name, side in sides.items() if name not in BY_STEP}
    if not sides:
        return []
    outside = [name for name, side in sides.items() if side]
    # less memory, and more speed, than usual is not a fault
    outside = [n for n in outside if not (n == MEMORY and sides[n] < 0)]
    outside = [n for n in outside if not (n == SPEED and sides[n] > 0)]
    recipe = watch.band.recipe
    if not outside:
        compared = ", ".join(f"{NAMES[name]} {watch.shown(name)}" for name in sides)
        return [f"as expected of {recipe}: {compared}"]
    lines = [
        f"not as expected of {recipe}: "
        + "; ".join(f"{NAMES[name]} {watch.shown(name)}" for name in outside)
    ]
    symptoms = Symptoms(
        watch=watch, sides={n: sides[n] for n in outside}, changed=changed, skipped=skipped
    )
    causes = likely_causes(symptoms)
    return lines + [f"  likely cause {i + 1}: {cause}" for i, cause in enumerate(causes)]


__all__ = ["ExpectedBand", "verdict"]
