"""Values of parameters that a model writes as plain text: their types, and conversion to JSON.

5 -> 5 for an integer, "5" for a string          True -> true for a boolean
[1, 2] -> [1, 2] for an array, "[1, 2]" for a string
"""

import json
import math
from collections.abc import Mapping

from easyllm.core.json_types import Json, JsonMapping

MAX_REFERENCES = 32
STRING = frozenset(["string"])
"""The types of a schema that allows only strings."""
_PYTHON = {"True": True, "False": False, "None": None}
"""Constants as templates write them that render values with Python's `str`."""


def resolved(schema: Json, root: JsonMapping) -> Json:
    """Returns a schema with its reference into the root schema followed.

    A reference that leads nowhere, or to itself, gives a schema without restrictions.
    """
    for _ in range(MAX_REFERENCES):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            return schema
        target: Json = root
        for part in schema["$ref"].removeprefix("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            target = target.get(name) if isinstance(target, Mapping) else None
        if not isinstance(target, Mapping):
            return {}
        schema = {**target, **{key: v for key, v in schema.items() if key != "$ref"}}
    return {}


def branches(schema: Json, root: JsonMapping, depth: int = 0) -> list[Json]:
    """Returns the alternatives of a schema: itself, or those of its `anyOf` or `oneOf`."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or depth > MAX_REFERENCES:
        return [schema]
    options = schema.get("anyOf") or schema.get("oneOf")
    if not isinstance(options, list):
        return [schema]
    return [each for option in options for each in branches(option, root, depth + 1)]


def types_of(schema: Json, root: JsonMapping) -> frozenset[str] | None:
    """Returns the names of the types that a schema allows; None if it allows all."""
    found = set[str]()
    for branch in branches(schema, root):
        if not isinstance(branch, Mapping):
            return None
        kind = branch.get("type")
        if isinstance(kind, str):
            found.add(kind)
        elif isinstance(kind, list):
            found.update(each for each in kind if isinstance(each, str))
        elif isinstance(branch.get("enum"), list):
            found.update(_type(value) for value in branch["enum"])
        elif "const" in branch:
            found.add(_type(branch["const"]))
        else:
            return None
    return frozenset(found)


def converted(text: str, schema: Json, root: JsonMapping) -> Json:
    """Returns the value that a text stands for, of a type that the schema allows.

    Any other text is a string.
    """
    types = types_of(schema, root)
    if types == STRING or _is_listed(text, schema, root):
        return text
    try:
        value = _PYTHON[text.strip()] if text.strip() in _PYTHON else _loads(text)
    except (ValueError, RecursionError):
        return text
    if types is None:
        return text if isinstance(value, str) else value
    is_allowed = _type(value) in types or (_type(value) == "integer" and "number" in types)
    return value if is_allowed else text


def _is_listed(text: str, schema: Json, root: JsonMapping) -> bool:
    """Whether a schema lists the text among its values."""
    for branch in branches(schema, root):
        if isinstance(branch, Mapping):
            listed = branch.get("enum")
            if text == branch.get("const") or (isinstance(listed, list) and text in listed):
                return True
    return False


def _loads(text: str) -> Json:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    value = json.loads(text, parse_constant=refuse)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(text)
    return value


def _type(value: Json) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"
