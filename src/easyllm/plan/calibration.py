"""What measured runs teach the planner about this machine: kept in the user's cache folder.

`easyllm plan RECIPE --calibrate` measures three steps and keeps how much memory a step took in
relation to the plan, and the utilisation that it reached. `easyllm doctor --measure` keeps the
rates. A record is of one processor and one version of torch; on another it is not used.
"""

import json
import platform
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from easyllm.core.atomic import write_atomic
from easyllm.core.device import cache_folder, cpu_features
from easyllm.core.json_types import JsonObject

FILE = "planner.json"
FACTORS = (0.25, 4.0)
"""Bounds of a correction; a run outside them was disturbed, or is not what was planned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Corrections and rates of this machine; None where nothing was measured.

    Attributes:
        step_factor: measured over planned bytes of what a step allocates: activations, gradients,
            logits and buffers.
        utilisation: share of the matmul rate that training reached.
        flops_per_s: matmul rate by dtype.
        read_bytes_per_s: memory bandwidth.
        measured: when, ISO 8601.
    """

    step_factor: float | None = None
    utilisation: float | None = None
    flops_per_s: dict[str, float] | None = None
    read_bytes_per_s: float | None = None
    measured: str = ""

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return asdict(self)


def read_calibration() -> Calibration:
    """Returns what was measured on this machine; an empty record if nothing was, or a damaged file
    is there."""
    try:
        values = json.loads(_path().read_text(encoding="utf-8"))
        if values.pop("machine") != _machine():
            return Calibration()
        return Calibration(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return Calibration()


def keep_calibration(**changes: object) -> Calibration:
    """Adds measurements to the record of this machine, and returns it."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    found = replace(read_calibration(), measured=now, **changes)  # type: ignore[arg-type]
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(found.as_dict() | {"machine": _machine()}, indent=2) + "\n")
    return found


def bounded(factor: float) -> float:
    """Returns a correction within `FACTORS`."""
    low, high = FACTORS
    return min(max(factor, low), high)


def _path() -> Path:
    return cache_folder() / FILE


def _machine() -> str:
    from importlib import metadata

    features = ",".join(sorted(cpu_features()))
    return f"{platform.machine()} {features} torch {metadata.version('torch')}"


__all__ = ["Calibration", "bounded", "keep_calibration", "read_calibration"]
