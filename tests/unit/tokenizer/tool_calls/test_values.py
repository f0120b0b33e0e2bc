"""Values of parameters that are written as text: their types under a schema."""

import pytest

from easyllm.tokenizer.tool_calls.values import converted, types_of

ROOT = {
    "$defs": {
        "count": {"type": "integer"},
        "word": {"$ref": "#/$defs/kind"},
        "kind": {"enum": ["a", 5, None]},
        "loop": {"$ref": "#/$defs/loop"},
        "a/b": {"type": "boolean"},
    }
}


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        ("5", {"type": "integer"}, 5),
        ("5.0", {"type": "integer"}, 5.0),
        ("5.5", {"type": "integer"}, "5.5"),
        ("5", {"type": "number"}, 5),
        ("True", {"type": "boolean"}, True),
        ("false", {"type": "boolean"}, False),
        ("None", {"type": ["null", "integer"]}, None),
        ("null", {"type": "string"}, "null"),
        ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("nul", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "nul"),
        ('["a"]', {"type": "array"}, ["a"]),
        ('["a"]', {"type": "string"}, '["a"]'),
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ("{'a': 1}", {"type": "object"}, "{'a': 1}"),
        ("5", {}, 5),
        ("x y", {}, "x y"),
        ('"x"', {}, '"x"'),
        ("5", True, 5),
        ("5", None, 5),
        ("5", {"enum": ["5", 5]}, "5"),
        ("5", {"enum": ["a", 5]}, 5),
        ("5", {"const": "5"}, "5"),
        ("5", {"$ref": "#/$defs/count"}, 5),
        ("a", {"$ref": "#/$defs/word"}, "a"),
        ("5", {"$ref": "#/$defs/word"}, 5),
        ("true", {"$ref": "#/$defs/a~1b"}, True),
        ("x", {"$ref": "#/$defs/loop"}, "x"),
        ("5", {"$ref": "#/$defs/missing"}, 5),
        ("NaN", {"type": "number"}, "NaN"),
        ("1e999", {"type": "number"}, "1e999"),
        ("[" * 100_000, {"type": "array"}, "[" * 100_000),
        ("9" * 10_000, {"type": "integer"}, "9" * 10_000),
        ("", {"type": "integer"}, ""),
    ],
)
def test_texts_are_converted_by_the_schema(text, schema, value):
    found = converted(text, schema, ROOT)
    assert found == value
    assert type(found) is type(value)


def test_types_of_alternatives_are_joined():
    schema = {
        "anyOf": [{"type": "string"}, {"oneOf": [{"$ref": "#/$defs/count"}, {"const": None}]}]
    }
    assert types_of(schema, ROOT) == {"string", "integer", "null"}
    assert types_of({"anyOf": [{"type": "string"}, {}]}, ROOT) is None
