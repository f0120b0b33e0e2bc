"""Constraints between fields as JSON Schema, for `/openapi.json`; the requests check them too."""

from collections.abc import Sequence

from pydantic.config import JsonDict

from easyllm.core.json_types import JsonObject

TRUE: JsonDict = {"const": True}
TEXT: JsonObject = {"type": "string"}


def described_object(**fields: JsonObject) -> JsonObject:
    """Returns the schema of an object with required fields, and any others."""
    return {"type": "object", "properties": fields, "required": [*fields]}


def needs(field: str, *, unless: Sequence[str | int] = (), **others: JsonDict) -> JsonDict:
    """Returns that a field requires other ones.

    Args:
        field: the field.
        unless: its values that require nothing; by default null, which is as if absent.
        others: the required fields and their schemas.
    """
    alone: JsonDict = {"properties": {field: {"enum": [None, *unless]}}}
    together: JsonDict = {"properties": {**others}, "required": [*others]}
    return {"anyOf": [alone, together]}


def only_one(*fields: str) -> JsonDict:
    """Returns that at most one of some fields is given."""
    absent: list[JsonDict] = [
        {"properties": {other: {"type": "null"} for other in fields if other != field}}
        for field in fields
    ]
    return {"anyOf": [*absent]}


def all_of(*constraints: JsonDict) -> JsonDict:
    """Returns that all constraints hold."""
    return {"allOf": [*constraints]}


__all__ = ["TEXT", "TRUE", "all_of", "described_object", "needs", "only_one"]
