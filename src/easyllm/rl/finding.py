"""What the doctor finds in a run."""

from dataclasses import asdict, dataclass

from easyllm.core.json_types import JsonObject

FEW_STEPS = 6
"""Trends are looked for in runs with at least this many logged steps."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something unusual in a run.

    Attributes:
        name: what it is called.
        metric: the metric that shows it.
        value: the metric's value.
        usual: the usual range, as text.
        change: what it means, and what to change.
    """

    name: str
    metric: str
    value: float
    usual: str
    change: str

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return asdict(self)


__all__ = ["FEW_STEPS", "Finding"]
