"""Checks a user's JSON schema, and rewrites it to one that llguidance honours exactly.

llguidance 1.9.1 refuses most keywords that it does not implement. It ignores others in silence
(`contentEncoding`, unknown formats of numbers, `nullable`, everything but references under a nested
`$schema`), and deviates in a few: dates such as 2023-02-29 pass `format: date`, bounds are rounded
to fp64, keys of additional properties may repeat. Here, each keyword is either honoured, or an
annotation, or refused by name.
"""

import json
from collections.abc import Iterable, Iterator
from copy import deepcopy
from urllib.parse import quote, unquote

from easyllm.core.json_types import Json, JsonObject
from easyllm.engine.guide_exclusive import are_exclusive
from easyllm.engine.guide_keywords import (
    ANNOTATIONS,
    CHECKS,
    NEUTRAL,
    REFUSED,
    RESOURCES,
    SCHEMA_LISTS,
    SCHEMA_MAPS,
    SCHEMAS,
    add_all_of,
    check_multiples,
    check_resource,
    check_unknown,
    invalid,
    refusal,
    shown,
    translated,
)
from easyllm.engine.guide_numbers import rewrite_bounds
from easyllm.engine.guide_regex import narrows
from easyllm.engine.guide_spec import MAX_SCHEMA_DEPTH, GuideError, depth_exceeds

VALUES_OF_USERS = ("const", "enum", "default", "examples")
"""Keywords whose values are data, not schemas."""
APPLICATORS = frozenset(("allOf", "anyOf", "oneOf", "$ref", "const", "enum"))
"""Keywords to place after all others: llguidance applies keywords before and after one of these
separately, and then ignores `additionalItems` apart from its `items`."""
ONE_OF_REMEDY = (
    "use anyOf, or give every option a required property whose const (or enum) differs from that "
    "of the others"
)


def prepare_schema(schema: Json) -> Json:
    """Returns a JSON schema for llguidance; every text that it accepts satisfies `schema`.

    Args:
        schema: an object, true or false; it is not changed.

    Raises:
        GuideError: the schema is invalid, or a keyword cannot be honoured; the message names the
            keyword, its place and what to do.
    """
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise GuideError(f"a JSON schema must be an object, true or false, not {shown(schema)}")
    if depth_exceeds(schema, MAX_SCHEMA_DEPTH):
        raise GuideError(f"json_schema is nested more than {MAX_SCHEMA_DEPTH} deep; flatten it")
    try:
        json.dumps(schema, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        message = "json_schema contains a lone surrogate, half of a character; give valid Unicode"
        raise GuideError(message) from None
    return _Preparation(deepcopy(schema)).run()


class _Preparation:
    """Checks the subschemas of a schema and rewrites them in place.

    Attributes:
        root: the schema.
        seen: ids of the subschemas that were checked.
        references: the subschemas with `$ref`, and what each refers to, by id.
        one_ofs: the subschemas with `oneOf`, each with its place.
        multiples: the values of `multipleOf`.
    """

    def __init__(self, root: JsonObject) -> None:
        self.root, self.seen = root, set[int]()
        self.references: dict[int, tuple[JsonObject, Json]] = {}
        self.one_ofs: list[tuple[JsonObject, str]] = []
        self.multiples: list[float] = []

    def run(self) -> JsonObject:
        self.check(self.root, "#")
        check_multiples(self.multiples)
        for node, place in self.one_ofs:
            if not are_exclusive(node["oneOf"], self.resolved):
                raise refusal("oneOf", place, "its options may overlap", ONE_OF_REMEDY)
        for node, _ in self.one_ofs:
            add_all_of(node, {"anyOf": node.pop("oneOf")})
        self.root.pop("$id", None)
        pointers = {id(node): pointer for node, pointer in _pointers(self.root)}
        for node, target in self.references.values():
            if isinstance(target, bool):
                del node["$ref"]
                add_all_of(node, target)
            else:
                node["$ref"] = pointers[id(target)]
        return self.root

    def resolved(self, node: Json) -> Json:
        """Returns the subschema at the end of a chain of `$ref`; `node` if there is none."""
        for _ in range(len(self.references)):
            if id(node) not in self.references:
                break
            node = self.references[id(node)][1]
        return node

    def check(self, node: Json, place: str) -> None:
        """Checks a subschema and everything in it.

        Raises:
            GuideError: it is invalid, or cannot be honoured.
        """
        if isinstance(node, bool) or id(node) in self.seen:
            return
        if not isinstance(node, dict):
            raise invalid("a schema", place, node, "an object, true or false")
        self.seen.add(id(node))
        for keyword in list(node):
            self.check_keyword(node, keyword, place)
        _check_min_properties(node, place)
        rewrite_bounds(node)
        for keyword in [key for key in node if key in APPLICATORS]:
            node[keyword] = node.pop(keyword)

    def check_keyword(self, node: JsonObject, keyword: str, place: str) -> None:
        """Checks one keyword of a subschema."""
        value, here = node[keyword], f"{place}/{_token(keyword)}"
        if keyword in SCHEMA_LISTS or (keyword == "items" and isinstance(value, list)):
            self.check_list(node, keyword, here)
        elif keyword in SCHEMAS:
            self.check(value, here)
        elif keyword in SCHEMA_MAPS:
            self.check_map(node, keyword, here)
        elif keyword == "$ref":
            self.references[id(node)] = (node, self.target(value, here))
        elif keyword in RESOURCES:
            check_resource(keyword, value, here, is_root=node is self.root)
        elif keyword in CHECKS:
            CHECKS[keyword](node, keyword, here)
        elif keyword in NEUTRAL and value is NEUTRAL[keyword]:
            del node[keyword]
        elif keyword in REFUSED:
            raise refusal(keyword, place, "it cannot be enforced", REFUSED[keyword])
        elif keyword not in ANNOTATIONS:
            check_unknown(keyword, place)
        if keyword == "oneOf":
            self.one_ofs.append((node, place))
        elif keyword == "multipleOf":
            self.multiples.append(value)

    def check_list(self, node: JsonObject, keyword: str, here: str) -> None:
        """Checks a list of subschemas."""
        value = node[keyword]
        if not isinstance(value, list) or not value:
            raise invalid(keyword, here, value, "a list of at least one schema")
        for index, each in enumerate(value):
            self.check(each, f"{here}/{index}")

    def check_map(self, node: JsonObject, keyword: str, here: str) -> None:
        """Checks an object whose values are subschemas."""
        value = node[keyword]
        if not isinstance(value, dict):
            raise invalid(keyword, here, value, "an object whose values are schemas")
        for name, each in value.items():
            self.check(each, f"{here}/{_token(name)}")
        if keyword == "patternProperties":
            _check_key_patterns(node, here)

    def target(self, reference: Json, here: str) -> Json:
        """Returns the subschema that a `$ref` names, checked."""
        if not isinstance(reference, str):
            raise invalid("$ref", here, reference, "a reference such as #/$defs/name")
        identity = self.root.get("$id")
        if isinstance(identity, str) and identity:
            reference = reference.removeprefix(identity.rstrip("#"))
        if reference not in ("", "#") and not reference.startswith("#/"):
            raise refusal(
                "$ref",
                here,
                f"{shown(reference)} is not in this schema, and nothing is fetched",
                "put the definition into $defs and write #/$defs/name",
            )
        found: Json = self.root
        before = ""
        for part in reference.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            is_value = name in VALUES_OF_USERS and before not in SCHEMA_MAPS
            found = None if is_value else _child(found, name)
            before = name
        if found is None:
            raise refusal("$ref", here, f"no schema is at {shown(reference)}", "correct it")
        self.check(found, reference or "#")
        return found


def _check_min_properties(node: JsonObject, place: str) -> None:
    """Refuses a number of additional properties, whose keys llguidance may repeat."""
    required = len(set(node.get("required", ())))
    if node.get("minProperties", 0) > required + 1:
        raise refusal(
            "minProperties",
            place,
            "keys of additional properties may repeat",
            "name the properties and list them in required",
        )


def _check_key_patterns(node: JsonObject, here: str) -> None:
    """Translates the patterns of keys.

    Refuses patterns of which validators differ on what they match: a key that only some of them
    match must not pass as an additional property.
    """
    schemas = node["patternProperties"]
    new = {translated(pattern, here): each for pattern, each in schemas.items()}
    if node.get("additionalProperties") is not False and any(map(narrows, schemas)):
        raise refusal(
            "patternProperties",
            here,
            r"validators differ on the keys that . \d \w and \s match",
            "write [0-9], [A-Za-z0-9_] or [^\\n], or set additionalProperties: false",
        )
    if len(new) < len(schemas):
        raise invalid("patternProperties", here, list(schemas), "different patterns")
    node["patternProperties"] = new


def _pointers(root: Json) -> Iterator[tuple[Json, str]]:
    """Yields all objects of a schema, each with its JSON pointer as a URI fragment."""
    pending: list[tuple[Json, str]] = [(root, "#")]
    while pending:
        value, pointer = pending.pop()
        items: Iterable[tuple[object, Json]] = ()
        if isinstance(value, dict):
            yield value, pointer
            items = value.items()
        elif isinstance(value, list):
            items = enumerate(value)
        pending += [(each, f"{pointer}/{_token(str(key))}") for key, each in items]


def _child(value: Json, name: str) -> Json:
    """Returns the value at a key or index; None if there is none."""
    if isinstance(value, dict):
        return value.get(name)
    is_index = isinstance(value, list) and name.isascii() and name.isdigit()
    return value[int(name)] if is_index and int(name) < len(value) else None


def _token(name: str) -> str:
    """Returns a key as part of a JSON pointer in a URI fragment."""
    return quote(name.replace("~", "~0").replace("/", "~1"), safe="$!'()*+,;=:@~")
