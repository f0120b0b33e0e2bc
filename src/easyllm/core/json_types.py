"""Names for parsed JSON and YAML, whose types only their readers know, and for annotations."""

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

__all__ = ["Json", "JsonMapping", "JsonObject", "TypeForm"]
