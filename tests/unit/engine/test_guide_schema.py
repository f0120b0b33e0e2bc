"""Each keyword of JSON Schema is honoured, an annotation, or refused by name."""

import math
import random
from copy import deepcopy

import pytest

from easyllm.engine.guide_schema import prepare_schema
from easyllm.engine.guide_spec import GuideError
from easyllm.engine.guided import Guides
from guide_texts import GuideTexts, is_valid

CLOSED = {"type": "object", "additionalProperties": False}


@pytest.fixture(scope="module")
def texts(tiny_tokenizer):
    return GuideTexts(Guides(tiny_tokenizer, vocab_size=320, eos_ids=(2,)), tiny_tokenizer, 2)


# ---- what is honoured: the texts that are accepted, and those that are not

HONOURED = {
    "type": ({"type": "integer"}, ["1", "-20", "0"], ["1.0", "1e3", "01", '"1"', "null"]),
    "types": ({"type": ["integer", "null"]}, ["1", "null"], ["true"]),
    "number": ({"type": "number"}, ["1", "-0.5", "1e5", "2E-3"], [".5", "1.", "+1", "NaN"]),
    "minimum": ({"type": "integer", "minimum": 3}, ["3", "10"], ["2", "-4"]),
    "exclusive": (
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        ["0.5", "0.001"],
        ["0", "1", "0.0", "1.0"],
    ),
    "a bound of many digits": (
        {"type": "number", "exclusiveMaximum": 1},
        ["0.9", "-3", "0.99999"],
        ["1", "0.99999999999999999999"],  # parsed as 1.0
    ),
    "multipleOf": ({"type": "integer", "multipleOf": 3}, ["9", "-6", "0"], ["10"]),
    "decimal multiple": ({"type": "number", "multipleOf": 0.25}, ["1.25", "2"], ["1.3"]),
    "minLength": ({"type": "string", "minLength": 2}, ['"中文"', '"ab"'], ['"中"', '""']),
    "maxLength": ({"type": "string", "maxLength": 2}, ['"中文"', '"\\n"'], ['"中文字"']),
    "2.0 as a length": ({"type": "string", "maxLength": 2.0}, ['"ab"'], ['"abc"']),
    "pattern is searched for": ({"type": "string", "pattern": "b"}, ['"abc"'], ['"ac"']),
    "anchored pattern": ({"type": "string", "pattern": "^b$"}, ['"b"'], ['"abc"']),
    "pattern and length": (
        {"type": "string", "pattern": "^a+$", "minLength": 2},
        ['"aa"'],
        ['"a"', '"ab"'],
    ),
    "const": ({"const": '中\n"x\\'}, ['"中\\n\\"x\\\\"'], ['"中"', '"\\u4e2d"']),
    "enum": ({"enum": ["é", 1.5, None, True]}, ['"é"', "1.5", "null", "true"], ["1", "false"]),
    "enum of lists": ({"enum": [[1, "a"], {"k": []}]}, ['[1,"a"]', '{"k": []}'], ["[1]", "{}"]),
    "enum and type": ({"type": "string", "enum": ["a", 1]}, ['"a"'], ["1"]),
    "items": ({"type": "array", "items": {"type": "null"}}, ["[]", "[null, null]"], ["[1]"]),
    "minItems": (
        {"type": "array", "items": {"const": 1}, "minItems": 1, "maxItems": 2},
        ["[1]", "[1,1]"],
        ["[]", "[1,1,1]"],
    ),
    "prefixItems": (
        {"type": "array", "prefixItems": [{"const": 1}], "items": False},
        ["[]", "[1]"],
        ["[2]", "[1,1]"],
    ),
    "items of draft 7": (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "array",
            "items": [{"const": 1}],
            "allOf": [{}],
            "additionalItems": False,
        },
        ["[1]"],
        ["[2]", "[1,1]"],
    ),
    "properties": (
        {**CLOSED, "properties": {"a": {"const": 1}, "中": {"const": 2}}, "required": ["中"]},
        ['{"a":1,"中":2}', '{"中": 2}', '{"a": 1, "中": 2}'],
        ['{"a":1}', "{}", '{"中":2,"a":1}', '{"中":2,"b":1}'],
    ),
    "additionalProperties": (
        {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": {"const": 2}},
        ['{"a":1,"b":2}', '{"b":2}', "{}"],
        ['{"a":2}', '{"b":1}', '{"\\u0061":2}'],
    ),
    "required of an undeclared key": (
        {"type": "object", "required": ["z"], "additionalProperties": {"const": 2}},
        ['{"z":2}', '{"z":2,"y":2}'],
        ["{}", '{"y":2}'],
    ),
    "patternProperties": (
        {**CLOSED, "patternProperties": {"^x": {"const": 1}, "^[ab]$": {"const": 2}}},
        ['{"xy":1}', '{"a":2,"x":1}'],
        ['{"xy":2}', '{"c":1}'],
    ),
    "minProperties": (
        {**CLOSED, "properties": {"a": {"const": 1}, "b": {"const": 1}}, "minProperties": 1},
        ['{"a":1}', '{"b":1}', '{"a":1,"b":1}'],
        ["{}"],
    ),
    "maxProperties": (
        {"type": "object", "maxProperties": 1, "additionalProperties": {"const": 1}},
        ["{}", '{"k":1}'],
        ['{"k":1,"l":1}'],
    ),
    "allOf": ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, ["3"], ["2", "3.5"]),
    "anyOf": ({"anyOf": [{"const": "a"}, {"type": "null"}]}, ['"a"', "null"], ['"b"']),
    "oneOf of types": ({"oneOf": [{"type": "string"}, {"type": "null"}]}, ['"a"', "null"], ["1"]),
    "siblings of $ref": (
        {"$ref": "#/$defs/s", "minLength": 2, "$defs": {"s": {"type": "string", "maxLength": 3}}},
        ['"ab"', '"abc"'],
        ['"a"', '"abcd"'],
    ),
    "a recursive $ref": (
        {**CLOSED, "properties": {"next": {"$ref": "#"}}},
        ["{}", '{"next":{"next":{}}}'],
        ['{"next":1}'],
    ),
    "names of references": (
        {
            "type": "array",
            "items": {"anyOf": [{"$ref": "#/$defs/中 文"}, {"$ref": "#/$defs/a~1b%25"}]},
            "$defs": {"中 文": {"const": 1}, "a/b%": {"const": 2}},
        },
        ["[1,2]"],
        ["[3]"],
    ),
    "a reference to true": (
        {"$ref": "#/$defs/t", "$defs": {"t": True}, "type": "null"},
        ["null"],
        ["1"],
    ),
    "a reference with $id": (
        {
            "$id": "https://example.com/s",
            "$ref": "https://example.com/s#/$defs/a",
            "$defs": {"a": {"const": 1}},
        },
        ["1"],
        ["2"],
    ),
    "a reference elsewhere": (
        {"$ref": "#/components/schemas/A", "components": {"schemas": {"A": {"format": "date"}}}},
        ['"2024-02-29"'],
        ['"2023-02-29"'],
    ),
    "annotations": (
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "T",
            "description": "D",
            "default": {"not": 1},
            "examples": [{"$ref": "http://x"}],
            "deprecated": True,
            "readOnly": True,
            "$comment": "c",
            "x-order": 3,
            "discriminator": {"propertyName": "k"},
            "type": "null",
        },
        ["null"],
        ["1"],
    ),
    "neutral values": (
        {"uniqueItems": False, "unevaluatedProperties": True, "nullable": False, "type": "null"},
        ["null"],
        ["1"],
    ),
    "properties named like keywords": (
        {**CLOSED, "properties": {"not": {"const": 1}, "$ref": {"const": 2}}, "required": ["$ref"]},
        ['{"not":1,"$ref":2}'],
        ['{"not":2,"$ref":2}'],
    ),
    "true": (True, ["1", '{"a": [null]}'], ["nul"]),
    "empty": ({}, ["1", '"x"', "[]"], ["", "{]"]),
    "nothing about lengths of numbers": ({"type": "integer", "minLength": 5}, ["1"], ['"1"']),
}


@pytest.mark.parametrize(("schema", "good", "bad"), HONOURED.values(), ids=HONOURED)
def test_a_keyword_is_honoured(texts, schema, good, bad):
    before = deepcopy(schema)
    for text in good:
        assert texts.accepts(text, json_schema=schema), text
        assert is_valid(text, schema), text
    for text in bad:
        assert not texts.accepts(text, json_schema=schema), text
    assert schema == before


FORMATS = {
    "date": (
        ["2024-02-29", "0001-01-01"],
        ["2023-02-29", "0000-01-01", "2024-13-01", "1900-02-29"],
    ),
    "time": (["23:59:59Z", "00:00:00.123+08:00"], ["24:00:00Z", "12:00:00", "12:00:60Z"]),
    "date-time": (["2024-02-29T12:00:00Z"], ["2024-02-29 12:00:00Z", "2023-02-29T12:00:00Z"]),
    "duration": (["P1D", "PT1H30M", "P1Y2M3DT4S", "P2W"], ["P", "PT", "P1S", "1D"]),
    "email": (["a.b+c@d-e.fr"], ["a", "@b", "a@", "a@b..c", "a b@c"]),
    "hostname": (["a.b-c", "localhost"], ["-a", "a-", "a..b", "a_b"]),
    "ipv4": (["0.0.0.0", "255.1.20.3"], ["256.1.1.1", "1.1.1", "01.1.1.1"]),
    "ipv6": (["::", "::1", "1:2:3:4:5:6:7:8", "fe80::1:2"], [":", "1:2", "1::2::3", "12345::"]),
    "uuid": (["123e4567-e89b-12d3-a456-426614174000"], ["123e4567e89b12d3a456426614174000"]),
    "uri": (["https://a.b/c?d=e#f", "mailto:a@b.c", "urn:x:y"], ["a", "//a", "http://a b"]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_enforced(texts, name):
    schema = {"type": "string", "format": name}
    good, bad = FORMATS[name]
    for value in good:
        assert texts.accepts_value(value, schema), value
        assert is_valid(f'"{value}"', schema), value
    for value in bad:
        assert not texts.accepts_value(value, schema), value


def test_dates_that_are_accepted_exist(texts):
    """llguidance's own format has 29 days in every February."""
    rng = random.Random(0)
    schema = {"type": "string", "format": "date"}
    for _ in range(300):
        year, month = rng.choice([1, 4, 100, 400, 1900, 2000, 2023, 2024, 9999]), rng.randint(1, 12)
        text = f'"{year:04}-{month:02}-{rng.randint(28, 31)}"'
        assert texts.accepts(text, json_schema=schema) == is_valid(text, schema), text


def test_a_format_and_a_pattern_hold_together(texts):
    schema = {"type": "string", "format": "date", "pattern": "^2024", "description": "d"}
    assert texts.accepts('"2024-02-29"', json_schema=schema)
    assert not texts.accepts('"2023-02-28"', json_schema=schema)


def test_blanks_are_bounded(texts):
    schema = {"type": "array", "items": {"const": 1}}
    assert texts.accepts("[1, 1]", json_schema=schema)
    for text in ("[ 1]", "[1,  1]", "[1 ,1]", " [1]", "[1]\n", "[1,\n1]"):
        assert not texts.accepts(text, json_schema=schema), text


@pytest.mark.parametrize("limit", [2**53 + 1, 2**53 + 3, 2**62 + 1, 2**63 - 1025, 10**18 + 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_bounds_that_fp64_rounds_are_never_exceeded(texts, limit, sign):
    schema = {"type": "integer", "maximum" if sign > 0 else "minimum": sign * limit}
    for value in range(limit - 3, limit + 600, 3):
        if texts.accepts(f"{sign * value}", json_schema=schema):
            assert value <= limit
    assert texts.accepts(f"{sign * (limit - 2000)}", json_schema=schema)


def test_bounds_of_many_digits_are_never_exceeded(texts):
    rng = random.Random(0)
    for _ in range(40):
        value = rng.uniform(-1000, 1000)
        for keyword, step in (("maximum", math.inf), ("minimum", -math.inf)):
            schema = {"type": "number", keyword: value}
            assert not texts.accepts(repr(math.nextafter(value, step)), json_schema=schema)


NUMBERS = [
    *("0", "-0", "0.0", "1", "1.0", "-1", "0.5", "-0.5", "0.25", "0.9", "0.99", "0.05", "1.5"),
    *("2.7", "2.75", "2.76", "2.700", "-2.7", "-2.75", "-2.76", "3", "10", "0.001", "-0.001"),
    *("0.99999999999999999999", "-0.99999999999999999999", "2.74999999999999999999999"),
]


@pytest.mark.parametrize("keywords", [("minimum", "maximum"), ("exclusiveMinimum", "maximum")])
@pytest.mark.parametrize("excluded", [False, True], ids=["", "maximum excluded"])
@pytest.mark.parametrize("low", [None, -2.75, -0.5, 0, 0.25, 1])
@pytest.mark.parametrize("high", [None, -0.25, 0, 0.5, 1, 1.5, 2.75])
def test_numbers_outside_their_bounds_are_never_accepted(texts, keywords, excluded, low, high):
    """Numbers inside are accepted, if they do not end with zeros."""
    if low is not None and high is not None and low >= high:
        return
    names = (keywords[0], "exclusiveMaximum" if excluded else keywords[1])
    bounds = {n: v for n, v in zip(names, (low, high), strict=True) if v is not None}
    schema = {"type": "number", **bounds}
    for text in NUMBERS:
        accepted, valid = texts.accepts(text, json_schema=schema), is_valid(text, schema)
        assert accepted <= valid, (text, schema)
        if bounds and len(text) < 7 and not text.endswith("0") and text != "-0":
            assert accepted == valid, (text, schema)


def test_an_integer_without_bounds_has_at_most_64_bits(texts):
    schema = {"type": "integer"}
    assert texts.accepts("9223372036854774784", json_schema=schema)
    assert not texts.accepts("9223372036854775808", json_schema=schema)


# ---- oneOf

CAT = {**CLOSED, "properties": {"kind": {"const": "cat"}}, "required": ["kind"]}
DOG = {
    **CLOSED,
    "properties": {"kind": {"$ref": "#/$defs/Name"}, "age": {"type": "integer"}},
    "required": ["kind"],
}
PETS = {"cat": CAT, "dog": DOG, "Name": {"enum": ["dog", "Dog"]}}


def test_one_of_referenced_objects_is_told_apart_by_a_constant(texts):
    schema = {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "$defs": PETS}
    for text in ('{"kind":"cat"}', '{"kind":"Dog","age":3}'):
        assert texts.accepts(text, json_schema=schema)
        assert is_valid(text, schema)
    assert not texts.accepts('{"kind":"cat","age":3}', json_schema=schema)


@pytest.mark.parametrize(
    "options",
    [
        [{"type": "integer"}, {"type": "number"}],
        [{"const": 1}, {"const": 1.0}],
        [{"enum": ["a", "b"]}, {"enum": ["b"]}],
        [{"type": "string"}, {}],
        [CAT, {**CAT, "required": []}],
        [CAT, {"type": "object"}],
        [{k: v for k, v in pet.items() if k != "type"} for pet in (CAT, DOG)],
        [{"pattern": "^a"}, {"pattern": "^b"}],
    ],
)
def test_one_of_options_that_may_overlap_is_refused(options):
    with pytest.raises(GuideError, match=r"oneOf .* may overlap; use anyOf"):
        prepare_schema({"oneOf": options, "$defs": PETS})


@pytest.mark.parametrize(
    "options",
    [
        [{"type": "integer"}, {"type": "string"}, {"type": "null"}],
        [{"const": 1}, {"const": True}, {"const": "1"}],
        [{"enum": ["a"]}, {"enum": ["b", 1]}],
        [{"type": "string"}, False],
    ],
)
def test_one_of_options_that_exclude_each_other_is_anyOf(options):
    prepared = prepare_schema({"oneOf": options})
    assert prepared["allOf"][0]["anyOf"] == prepare_schema({"anyOf": options})["anyOf"]


# ---- what is refused

REFUSED = {
    "uniqueItems": {"uniqueItems": True},
    "contains": {"contains": {}},
    "minContains": {"minContains": 1},
    "maxContains": {"maxContains": 1},
    "not": {"not": {}},
    "if": {"if": {}},
    "then": {"then": {}},
    "else": {"else": {}},
    "dependentRequired": {"dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"dependentSchemas": {}},
    "dependencies": {"dependencies": {}},
    "propertyNames": {"propertyNames": {"pattern": "^a"}},
    "unevaluatedProperties": {"unevaluatedProperties": False},
    "unevaluatedItems": {"unevaluatedItems": False},
    "contentEncoding": {"contentEncoding": "base64"},
    "contentMediaType": {"contentMediaType": "application/json"},
    "contentSchema": {"contentSchema": {}},
    "nullable": {"nullable": True},
    "$dynamicRef": {"$dynamicRef": "#a"},
    "$recursiveRef": {"$recursiveRef": "#"},
    "$vocabulary": {"$vocabulary": {}},
    "x-guidance": {"x-guidance": {"lenient": True}},
    "format": {"format": "idn-email"},
    "exclusiveMinimum": {"minimum": 5, "exclusiveMinimum": True},
    "exclusiveMaximum": {"exclusiveMaximum": False},
    "minProperties": {"minProperties": 2},
    "maxlength": {"type": "string", "maxlength": 3},
    "min_items": {"min_items": 3},
    "Required": {"Required": ["a"]},
    "$ref": {"$ref": "https://example.com/schema.json"},
    "oneOf": {"oneOf": [{"type": "string"}, {"maxLength": 3}]},
    "patternProperties": {"patternProperties": {r"^\d": {}}},
}


@pytest.mark.parametrize("keyword", REFUSED)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_keyword_that_cannot_be_honoured_is_refused_by_name(keyword, depth):
    schema, place = REFUSED[keyword], "#"
    for _ in range(depth):
        schema, place = (
            {"properties": {"a/b": {"items": schema}}},
            f"#/properties/a~1b/items{place[1:]}",
        )
    with pytest.raises(GuideError) as error:
        prepare_schema(schema)
    assert error.value.keyword == keyword
    assert keyword in str(error.value)
    assert place in str(error.value)


INVALID = [
    ({"type": "strng"}, "did you mean 'string'"),
    ({"type": []}, "at least one type"),
    ({"type": [1]}, "type at #/type"),
    ({"enum": []}, "at least one value"),
    ({"enum": "a"}, "at least one value"),
    ({"anyOf": []}, "at least one schema"),
    ({"allOf": {}}, "at least one schema"),
    ({"properties": []}, "an object whose values are schemas"),
    ({"properties": {"a": 1}}, "an object, true or false"),
    ({"items": 1}, "an object, true or false"),
    ({"required": "a"}, "a list of names"),
    ({"required": [1]}, "a list of names"),
    ({"minLength": -1}, "at least 0"),
    ({"minLength": 1.5}, "an integer"),
    ({"maxLength": True}, "an integer"),
    ({"maxItems": 10**9}, "at most 1,000"),
    ({"maxLength": 10**9}, "at most 100,000"),
    ({"minimum": "3"}, "a number"),
    ({"maximum": 1e30}, "a number of at most"),
    ({"multipleOf": 0}, "1e-9"),
    ({"multipleOf": 12345}, "four digits"),
    ({"allOf": [{"multipleOf": 9_999}, {"multipleOf": 999.7e-3}]}, "may apply together"),
    ({"pattern": 1}, "a regular expression"),
    ({"pattern": "(?=a)"}, "lookahead"),
    ({"patternProperties": {"(?=a)": {}}}, "lookahead"),
    ({"format": 1}, "format"),
    ({"const": 2**60}, "2\\^53"),
    ({"enum": [[{"a": 2**60}]]}, "2\\^53"),
    ({"const": 0.12345678901234567}, "15 digits"),
    ({"$ref": 1}, "a reference such as"),
    ({"$ref": "#/$defs/none"}, "no schema is at"),
    ({"$ref": "#name"}, "nothing is fetched"),
    ({"$ref": "other.json"}, "nothing is fetched"),
    ({"$ref": "file:///etc/passwd"}, "nothing is fetched"),
    ({"$ref": "#/const", "const": {"nullable": False}}, "no schema is at"),
    ({"$schema": "http://json-schema.org/draft-04/schema#"}, "one of https"),
    ({"$schema": 4}, "a text"),
    (
        {"properties": {"a": {"$schema": "http://json-schema.org/draft-04/schema#"}}},
        "inside another",
    ),
    ({"properties": {"a": {"$id": "x"}}}, "inside another"),
    ([], "an object, true or false"),
    (None, "an object, true or false"),
    ("x", "an object, true or false"),
]


@pytest.mark.parametrize(("schema", "message"), INVALID)
def test_an_invalid_schema_is_refused(schema, message):
    with pytest.raises(GuideError, match=message):
        prepare_schema(schema)


UNSATISFIABLE = [
    {"type": "string", "minLength": 3, "maxLength": 2},
    {"type": "integer", "minimum": 3, "maximum": 2},
    {"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 6},
    {"type": "array", "minItems": 3, "maxItems": 2},
    {**CLOSED, "required": ["a"]},
    {"allOf": [{"type": "string"}, {"type": "null"}]},
    {"type": "string", "pattern": "^a$", "format": "date"},
    {"type": "string", "const": 1},
    {"$ref": "#/$defs/n", "$defs": {"n": {"$ref": "#/$defs/n"}}},
    {**CLOSED, "properties": {"a": False}, "required": ["a"]},
]


@pytest.mark.parametrize("schema", UNSATISFIABLE)
def test_a_schema_that_nothing_satisfies_is_refused(texts, schema):
    with pytest.raises(GuideError, match="cannot be honoured"):
        texts.accepts("", json_schema=schema)


def test_false_is_refused(texts):
    with pytest.raises(GuideError, match="no text satisfies"):
        texts.accepts("", json_schema=False)


def test_patterns_of_keys_that_do_not_exclude_each_other_are_refused(texts):
    schema = {"patternProperties": {"^a": {}, "b$": {}}, "additionalProperties": False}
    with pytest.raises(GuideError, match="not disjoint"):
        texts.accepts("{}", json_schema=schema)


def test_optional_properties_beside_a_number_of_properties_are_refused(texts):
    schema = {**CLOSED, "properties": {"a": {}, "b": {}, "c": {}}, "maxProperties": 2}
    with pytest.raises(GuideError, match="maxProperties"):
        texts.accepts("{}", json_schema=schema)
