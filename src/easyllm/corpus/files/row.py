"""One row of a data file of any format."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a data file, and its location (`file:line`, or `file[index]` in an array)."""

    values: dict[str, Any]
    location: str
