"""Measures three steps of a recipe in a process of its own, and compares them with their plan."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.core.jsonl import read_json_objects
from easyllm.core.manifest import MANIFEST_FILE
from easyllm.plan.calibration import Calibration, bounded, keep_calibration

METRICS = "metrics.jsonl"
STEPS = 3
"""The first step is not timed: it fills caches, and a process allocates most of its memory in it.
A rollout of two updates is in one of the two others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A component of memory, or a time: planned and measured.

    Attributes:
        name: what it is.
        planned, measured: bytes, or seconds.
    """

    name: str
    planned: float
    measured: float

    @property
    def error(self) -> float:
        """Relative error of the plan."""
        return self.planned / self.measured - 1 if self.measured else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """What the steps were planned to need, what they needed, and the correction that is kept."""

    memory: tuple[Comparison, ...]
    seconds: Comparison
    kept: Calibration

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return {
            "memory_bytes": {
                each.name: {
                    "planned": round(each.planned),
                    "measured": round(each.measured),
                    "error": round(each.error, 4),
                }
                for each in self.memory
            },
            "seconds": {
                "planned": self.seconds.planned,
                "measured": self.seconds.measured,
                "error": round(self.seconds.error, 4),
            },
            "kept": self.kept.as_dict(),
        }


def calibrate(recipe: str, overrides: Sequence[str]) -> CalibrationReport:
    """Runs three steps of a training recipe, and keeps how they differ from the plan.

    Args:
        recipe: path or name of a training recipe.
        overrides: `key=value` words; the number of steps and the output are set here.

    Raises:
        ConfigError: the run failed; the message is its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        words = [
            *overrides,
            f"max_steps={STEPS}",
            "log_every=1",
            "save_every=0",
            f"output={output}",
        ]
        command = [sys.executable, "-m", "easyllm", "train", recipe, *words, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        manifest = output / MANIFEST_FILE
        if done.returncode or not manifest.is_file():
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise ConfigError(
                f"the {STEPS} steps of {recipe} failed: {lines[-1].removeprefix('error: ')}"
            )
        results = json.loads(manifest.read_text(encoding="utf-8"))["results"]
        seconds = [
            row["train/tokens"] / row["speed/tokens_per_s"]
            for row in read_json_objects(output / METRICS)
            if row.get("speed/tokens_per_s")
        ]
    return compare(results, seconds)


def compare(results: JsonObject, step_seconds: Sequence[float]) -> CalibrationReport:
    """Compares the plan and the measurements in a manifest, and keeps the correction.

    Args:
        results: `results` of the manifest of a training run on a CPU.
        step_seconds: seconds of each of its steps.
    """
    planned, measured = results["predicted_bytes"], results["measured_bytes"]
    known = {name: (planned[name], measured[name]) for name in ("weights", "optimizer")}
    own = planned["process"]
    step_planned = results["uncorrected_peak_bytes"] - own - sum(p for p, _ in known.values())
    step = results["peak_rss_bytes"] - own - sum(m for _, m in known.values())
    memory = [Comparison(name=name, planned=p, measured=m) for name, (p, m) in known.items()]
    memory.append(Comparison(name="step", planned=step_planned, measured=step))
    total = Comparison(
        name="whole process",
        planned=results["uncorrected_peak_bytes"],
        measured=results["peak_rss_bytes"],
    )
    count, timed = len(step_seconds), step_seconds[1:] or step_seconds
    seconds = Comparison(
        name="seconds",
        planned=results["predicted_seconds"],
        measured=count * sum(timed) / max(1, len(timed)),
    )
    utilisation = results["predicted_utilisation"] * seconds.planned / max(seconds.measured, 1e-9)
    correction: JsonObject = {"utilisation": min(1.0, utilisation)}
    if planned.get("peak") != "load":  # while weights are read, no step is in memory
        correction["step_factor"] = bounded(step / step_planned) if step_planned > 0 else None
    kept = keep_calibration(**correction)
    return CalibrationReport(memory=(*memory, total), seconds=seconds, kept=kept)


__all__ = ["CalibrationReport", "Comparison", "calibrate", "compare"]
