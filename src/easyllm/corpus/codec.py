"""Typed values as JSON: the form in which work items are hashed, recorded and sent to a cluster.

A value is a dataclass whose fields are dataclasses, configurations, paths or plain values. Its JSON
form is an object with the fields in order; paths become strings and tuples become lists.
"""

import json
from typing import TypeVar

from pydantic import TypeAdapter

from easyllm.core.json_types import Json

Value = TypeVar("Value")
_ADAPTERS: dict[type, TypeAdapter[object]] = {}
"""One for each class in use, since building one takes milliseconds."""


def to_json(value: object) -> Json:
    """Returns the JSON form of a value, for `json.dumps` or `hash_value`."""
    return _adapter(type(value)).dump_python(value, mode="json")


def from_json(kind: type[Value], values: Json) -> Value:
    """Restores a value from the result of `to_json`.

    Args:
        kind: the class of the value.
        values: its JSON form; fields with a default may be absent, other keys are ignored.

    Raises:
        ValueError: a field is absent or has another type.
    """
    restored = _adapter(kind).validate_python(values)
    assert isinstance(restored, kind)
    return restored


def encode(value: object) -> str:
    """Returns a value as a JSON string."""
    return json.dumps(to_json(value))


def decode(kind: type[Value], text: str) -> Value:
    """Restores a value from the result of `encode`; arguments and errors as in `from_json`."""
    return from_json(kind, json.loads(text))


def _adapter(kind: type) -> TypeAdapter[object]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter[object](kind)
    return _ADAPTERS[kind]
