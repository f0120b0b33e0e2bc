"""Keywords of JSON Schema: which are honoured, which are annotations, and which are refused.

The value of an honoured keyword is checked, and rewritten where llguidance would deviate from it.
"""

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from itertools import combinations
from urllib.parse import unquote

from easyllm.core.errors import suggest
from easyllm.core.json_types import Json, JsonObject
from easyllm.engine.guide_formats import FORMATS, MAX_LENGTHS
from easyllm.engine.guide_numbers import BOUNDS, MAX_INTEGER, is_exact
from easyllm.engine.guide_regex import portable_regex
from easyllm.engine.guide_spec import GuideError

MAX_ITEMS = 1_000
"""Maximum of `minItems` and `maxItems`: llguidance writes out every item."""
MIN_MULTIPLE, MAX_MULTIPLE = 1e-9, 10_000
"""Bounds of `multipleOf` and of its digits: each remainder is a lexer state."""
MAX_COUNT = 100_000
"""Maximum of other lengths and counts; each character of a bounded string is a lexer state."""
DRAFTS = (
    "https://json-schema.org/draft/2020-12/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "http://json-schema.org/draft-07/schema",
    "http://json-schema.org/draft-06/schema",
)
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
ANNOTATIONS = frozenset(
    (
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
        *("$comment", "$anchor"),
    )
)
COUNTS = ("minLength", "maxLength", "minProperties", "maxProperties", "minItems", "maxItems")
SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
SCHEMAS = ("additionalProperties", "additionalItems", "items")
VALUES = ("type", "enum", "const", "multipleOf", "pattern", "format", "required", "$ref")
RESOURCES = ("$schema", "$id")
NEUTRAL: dict[str, Json] = {
    "uniqueItems": False,
    "unevaluatedProperties": True,
    "unevaluatedItems": True,
    "nullable": False,
}
"""Values with which a keyword, which is refused otherwise, changes nothing."""
REFUSED = {
    "uniqueItems": "remove it and check the result, or give the items as properties",
    "contains": "put the required item first, with prefixItems",
    "minContains": "put the required items first, with prefixItems",
    "maxContains": "put the required items first, with prefixItems",
    "not": "describe what is allowed instead",
    "if": "write the cases as anyOf, each with a const that tells it apart",
    "then": "write the cases as anyOf, each with a const that tells it apart",
    "else": "write the cases as anyOf, each with a const that tells it apart",
    "dependentRequired": "write the cases as anyOf, each with its own required",
    "dependentSchemas": "write the cases as anyOf, each with its own properties",
    "dependencies": "write the cases as anyOf, each with its own properties",
    "propertyNames": "use patternProperties with additionalProperties: false",
    "unevaluatedProperties": "use additionalProperties in each object",
    "unevaluatedItems": "use items: false after prefixItems",
    "contentEncoding": "use pattern",
    "contentMediaType": "describe the value itself instead of a text that contains it",
    "contentSchema": "describe the value itself instead of a text that contains it",
    "nullable": 'it is of OpenAPI 3.0; write type: ["string", "null"], or anyOf',
    "$dynamicRef": "use $ref",
    "$dynamicAnchor": "use $defs and $ref",
    "$recursiveRef": "use $ref",
    "$recursiveAnchor": "use $defs and $ref",
    "$vocabulary": "leave it out",
    "x-guidance": "options of llguidance cannot be set by a schema; leave it out",
}
"""What to do instead of each keyword that cannot be honoured."""
HONOURED = (*COUNTS, *BOUNDS, *SCHEMA_LISTS, *SCHEMA_MAPS, *SCHEMAS, *VALUES, *RESOURCES)
FOLDED = {word.lower(): word for word in (*HONOURED, *REFUSED)} | {"ref": "$ref", "defs": "$defs"}


def invalid(keyword: str, place: str, value: Json, expected: str) -> GuideError:
    """Returns the error for a value that a keyword cannot have."""
    return GuideError(
        f"json_schema: {keyword} at {unquote(place)} is {shown(value)}, expected {expected}",
        keyword=keyword,
    )


def refusal(keyword: str, place: str, reason: str, remedy: str) -> GuideError:
    """Returns the error for a keyword that cannot be honoured."""
    return GuideError(
        f"json_schema: the keyword {keyword} at {unquote(place)} is not supported: {reason}; "
        f"{remedy}",
        keyword=keyword.partition(":")[0],
    )


def shown(value: Json) -> str:
    """Returns a value for an error message, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def add_all_of(node: JsonObject, schema: Json) -> None:
    """Adds a schema that must hold too."""
    node["allOf"] = [*node.get("allOf", ()), schema]


def check_resource(keyword: str, value: Json, here: str, *, is_root: bool) -> None:
    """Checks `$schema` or `$id`, which only the root may have."""
    if not is_root:
        raise refusal(keyword, here, "it is inside another schema", "leave it out")
    if not isinstance(value, str):
        raise invalid(keyword, here, value, "a text")
    if keyword == "$schema" and value.rstrip("#") not in DRAFTS:
        raise invalid(keyword, here, value, f"one of {', '.join(DRAFTS)}")


def check_unknown(keyword: str, place: str) -> None:
    """Refuses a misspelled keyword; JSON Schema ignores other unknown ones."""
    folded = keyword.replace("_", "").replace("-", "").lower()
    known = FOLDED.get(folded)
    if known is not None:
        raise refusal(keyword, place, "it is not a keyword", f"write {known}")


def _check_type(node: JsonObject, keyword: str, here: str) -> None:
    value = node[keyword]
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or name not in TYPES:
            hint = suggest(name, TYPES) if isinstance(name, str) else ""
            raise invalid(keyword, here, value, f"one of {', '.join(TYPES)}, or a list{hint}")
    if not names:
        raise invalid(keyword, here, value, "at least one type")


def _check_enum(node: JsonObject, keyword: str, here: str) -> None:
    if not isinstance(node[keyword], list) or not node[keyword]:
        raise invalid(keyword, here, node[keyword], "a list of at least one value")
    _check_exact(node[keyword], keyword, here)


def _check_const(node: JsonObject, keyword: str, here: str) -> None:
    _check_exact(node[keyword], keyword, here)


def _check_exact(value: Json, keyword: str, here: str) -> None:
    """Refuses numbers that llguidance would round."""
    values = value.values() if isinstance(value, dict) else value
    for each in values if isinstance(value, dict | list) else ():
        _check_exact(each, keyword, here)
    if _is_number(value) and not is_exact(value):
        expected = "numbers of at most 15 digits and 2^53; give others as text"
        raise invalid(keyword, here, value, expected)


def _check_required(node: JsonObject, keyword: str, here: str) -> None:
    value = node[keyword]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise invalid(keyword, here, value, "a list of names")


def _check_count(node: JsonObject, keyword: str, here: str) -> None:
    value = node[keyword]
    limit = MAX_ITEMS if keyword.endswith("Items") else MAX_COUNT
    if not _is_number(value) or value < 0 or value != int(value):
        raise invalid(keyword, here, value, "an integer of at least 0")
    if value > limit:
        raise invalid(keyword, here, value, f"at most {limit:,}")
    node[keyword] = int(value)


def _check_bound(node: JsonObject, keyword: str, here: str) -> None:
    value = node[keyword]
    if isinstance(value, bool) and keyword.startswith("exclusive"):
        plain = keyword[9:].lower()
        raise refusal(
            keyword, here, "true and false are of draft 4", f"write {keyword}: 5 for {plain}: 5"
        )
    if not _is_number(value) or abs(value) > MAX_INTEGER:
        raise invalid(keyword, here, value, f"a number of at most {MAX_INTEGER:,}")


def _check_multiple(node: JsonObject, keyword: str, here: str) -> None:
    value = node[keyword]
    if not _is_number(value) or not value >= MIN_MULTIPLE or _digits(value, 0) > MAX_MULTIPLE:
        raise invalid(keyword, here, value, "a number from 1e-9 with at most four digits")


def check_multiples(values: Sequence[float]) -> None:
    """Refuses values of `multipleOf` whose common multiple llguidance computes wrongly."""
    for one, other in combinations(values, 2):
        decimals = max(_decimals(one), _decimals(other))
        if _digits(one, decimals) * _digits(other, decimals) >= 2**32:
            raise refusal(
                "multipleOf", "#", f"{one} and {other} may apply together", "use smaller values"
            )


def _digits(value: float, decimals: int) -> int:
    """Returns a number without its decimal point, after at least `decimals` decimals."""
    return int(Decimal(repr(value)).scaleb(max(decimals, _decimals(value))))


def _decimals(value: float) -> int:
    exponent = Decimal(repr(value)).normalize().as_tuple().exponent
    assert isinstance(exponent, int), "the number is finite"
    return max(0, -exponent)


def _check_pattern(node: JsonObject, keyword: str, here: str) -> None:
    if not isinstance(node[keyword], str):
        raise invalid(keyword, here, node[keyword], "a regular expression")
    node[keyword] = translated(node[keyword], here)


def translated(pattern: str, here: str) -> str:
    """Returns a pattern in llguidance's dialect.

    Raises:
        GuideError: it cannot be honoured.
    """
    try:
        return portable_regex(pattern)
    except GuideError as error:
        raise GuideError(f"json_schema at {here}: {error}", keyword=error.keyword) from error


def _check_format(node: JsonObject, keyword: str, here: str) -> None:
    """Replaces a format by its regular expression."""
    value = node.pop(keyword)
    if not isinstance(value, str) or value not in FORMATS:
        hint = suggest(value, FORMATS) if isinstance(value, str) else ""
        raise refusal(
            f"format: {shown(value)}",
            here,
            f"it is not a format that can be enforced{hint}",
            f"use pattern, or one of {', '.join(FORMATS)}",
        )
    rule: JsonObject = {"pattern": f"^(?:{FORMATS[value]})$"}
    if value in MAX_LENGTHS:
        rule["maxLength"] = MAX_LENGTHS[value]
    add_all_of(node, rule)


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


CHECKS: Mapping[str, Callable[[JsonObject, str, str], None]] = {
    "type": _check_type,
    "enum": _check_enum,
    "const": _check_const,
    "required": _check_required,
    "multipleOf": _check_multiple,
    "pattern": _check_pattern,
    "format": _check_format,
    **dict.fromkeys(COUNTS, _check_count),
    **dict.fromkeys(BOUNDS, _check_bound),
}
