"""Names for parsed JSON and YAML, whose types only their readers know, and for annotations."""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

Json: TypeAlias = Any
"""A value: null, a boolean, number, string, list or object; to be checked before it is used."""
JsonObject: TypeAlias = dict[str, Any]
"""An object of a file, request, recipe, chat message or configuration, by its keys."""
JsonMapping: TypeAlias = Mapping[str, Any]
"""The same, read-only."""

TypeForm: TypeAlias = Any
"""A type annotation, such as `int | None`; Python has no type for them yet."""


def finite_json(value: Json) -> Json:
    """Returns a JSON value with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(each) for each in value]
    return value


__all__ = ["Json", "JsonMapping", "JsonObject", "TypeForm", "finite_json"]
