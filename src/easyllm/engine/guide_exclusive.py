"""Whether at most one of several schemas can hold: when `oneOf` equals `anyOf`.

Typical unions are told apart by their types, or by a required property with a constant (a
discriminator). llguidance does not follow references here, which is how pydantic writes them.
"""

from collections.abc import Callable, Sequence

from easyllm.core.json_types import Json, JsonObject

ALL_TYPES = frozenset(("null", "boolean", "number", "string", "array", "object"))
Values = frozenset[tuple[str, object]]
"""Scalar JSON values as (type, value): 1 and true differ, 1 and 1.0 do not."""


def are_exclusive(options: Sequence[Json], resolve: Callable[[Json], Json]) -> bool:
    """Whether it is certain that no value satisfies two of the schemas.

    Args:
        options: the schemas.
        resolve: returns the schema at the end of a chain of references.
    """
    sides = [_Facts.of(resolve(option), resolve) for option in options]
    return all(one.excludes(other) for i, one in enumerate(sides) for other in sides[i + 1 :])


class _Facts:
    """What certainly holds for every value of a schema.

    Attributes:
        types: its type is one of these.
        values: it is one of these, if not None.
        properties: it has these properties, each with one of the values; if it is an object.
    """

    def __init__(
        self, types: frozenset[str], values: Values | None, properties: dict[str, Values]
    ) -> None:
        self.types, self.values, self.properties = types, values, properties

    @classmethod
    def of(cls, schema: Json, resolve: Callable[[Json], Json]) -> "_Facts":
        if not isinstance(schema, dict):
            return cls(ALL_TYPES if schema else frozenset(), None, {})
        values = _values(schema)
        types = _types(schema)
        if values is not None:
            types &= {kind for kind, _ in values}
        declared = schema.get("properties", {})
        required = [name for name in schema.get("required", ()) if name in declared]
        found = {name: _values(resolve(declared[name])) for name in required}
        return cls(types, values, {n: v for n, v in found.items() if v is not None})

    def excludes(self, other: "_Facts") -> bool:
        if not self.types & other.types:
            return True
        if self.values is not None and other.values is not None:
            return not self.values & other.values
        shared = self.properties.keys() & other.properties.keys()
        differs = any(not self.properties[n] & other.properties[n] for n in shared)
        return differs and self.types & other.types == {"object"}


def _types(schema: JsonObject) -> frozenset[str]:
    names = schema.get("type")
    if names is None:
        return ALL_TYPES
    listed = names if isinstance(names, list) else [names]
    return frozenset("number" if name == "integer" else name for name in listed)


def _values(schema: Json) -> Values | None:
    """Returns the values of `const` or `enum`; None if there are none, or not only scalars."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        listed = [schema["const"]]
    elif "enum" in schema:
        listed = schema["enum"]
    else:
        return None
    if any(isinstance(value, dict | list) for value in listed):
        return None
    return frozenset((_kind(value), value) for value in listed)


def _kind(value: Json) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    return "string" if isinstance(value, str) else "number"
