"""One row of a data file of any format."""

from dataclasses import dataclass

from easyllm.core.json_types import JsonObject


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a data file, and its location (`file:line`, or `file[index]` in an array)."""

    values: JsonObject
    location: str
