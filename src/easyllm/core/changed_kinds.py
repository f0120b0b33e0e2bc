"""Overrides that select another kind of a section, such as `adapter.kind=ia3`.

The recipe's settings of that section were written for another kind. Those that the new kind does
not have are left out, with a note; those that the user gives as overrides are never left out.
"""

from collections.abc import Iterable, Mapping

from pydantic import BaseModel

from easyllm.core.config import apply_overrides, fields_of_kind
from easyllm.core.environment import environment_overrides, misspelled_variables
from easyllm.core.json_types import Json, JsonMapping, JsonObject
from easyllm.core.progress import console


def overridden(
    model: type[BaseModel], written: JsonMapping, words: Iterable[str], *, source: str
) -> JsonObject:
    """Returns a recipe's values with overrides and `EASYLLM_*` variables applied.

    Args:
        model: the configuration that the values describe.
        written: the values in the recipe's file.
        words: overrides, as `key.sub=value`.
        source: name of the file, for notes.

    Raises:
        ConfigError: a word is not of the form `key=value`.
    """
    for warning in misspelled_variables(model):
        console().print(f"warning: {warning}", soft_wrap=True, markup=False)
    changes = [*environment_overrides(model), *words]
    values = apply_overrides(written, changes)
    keys = [word.partition("=")[0].strip() for word in changes]
    for key in keys:
        section, dot, leaf = key.rpartition(".")
        if not dot or leaf != "kind":
            continue
        place = tuple(section.split("."))
        before, after = _at(written, place), _at(values, place)
        if not isinstance(before, Mapping) or not isinstance(after, dict):
            continue
        if before.get("kind") == after.get("kind"):
            continue
        known = fields_of_kind(model, place, values, str(after["kind"]))
        foreign = [
            name
            for name in before
            if known and name not in known and f"{section}.{name}" not in keys
        ]
        for name in foreign:
            del after[name]
        if foreign:
            left_out = ", ".join(f"{name}={before[name]}" for name in foreign)
            console().print(
                f"note: {section}.kind={after['kind']} has no {left_out} of {source}; left out",
                soft_wrap=True,
                markup=False,
            )
    return values


def _at(values: Json, place: tuple[str, ...]) -> Json:
    """The value at a path; None if there is none."""
    for part in place:
        if not isinstance(values, Mapping) or part not in values:
            return None
        values = values[part]
    return values


__all__ = ["overridden"]
