"""Grammars of parameters that are written as plain text between tags.

A value that the schema allows to be a string is written as free text up to the tag that ends it,
restricted by the schema's `enum`, `const`, `pattern`, `minLength`, `maxLength` and `format`. All
other values are JSON.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from easyllm.core.errors import DataError
from easyllm.core.json_types import Json, JsonMapping
from easyllm.tokenizer.tool_calls.lark import Lark, containing, quoted
from easyllm.tokenizer.tool_calls.tools import Tool
from easyllm.tokenizer.tool_calls.values import branches, types_of

_NOTES = frozenset(
    ["title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"]
)
_DEFINITIONS = ("$defs", "definitions")
_ROOT = _NOTES | {"type", "properties", "required", "additionalProperties"}
_ROOT |= {*_DEFINITIONS, "$schema", "$id", "$comment", "strict"}
_STRING = _NOTES | {"type", "enum", "const", "pattern", "minLength", "maxLength", "format"}
_STRING |= {"$comment"}
_HOUR = (
    r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?"
    r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_DATE = (
    r"[0-9]{4}-(02-(0[1-9]|1[0-9]|2[0-8])|(0[13-9]|1[0-2])-(0[1-9]|[12][0-9]|30)|"
    r"(0[13578]|1[02])-31)"
)
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
FORMATS = {
    "date": _DATE,
    "time": _HOUR,
    "date-time": f"{_DATE}T{_HOUR}",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,7}}",
    "email": rf"[a-zA-Z0-9_+-]+(\.[a-zA-Z0-9_+-]+)*@{_LABEL}(\.{_LABEL}){{1,7}}",
    "uri": rf"https?:\/\/{_LABEL}(\.{_LABEL}){{0,7}}(\/[a-zA-Z0-9._~-]*)*",
}
"""Formats of strings as regular expressions that match only, but not all, valid ones."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a tool.

    Attributes:
        name: its name; None for any parameter that the schema does not name.
        schema: the JSON Schema of its value.
        is_required: whether it must be given.
    """

    name: str | None
    schema: Json
    is_required: bool

    @property
    def repeat(self) -> str:
        """How often it may be written if it is not required, as an operator."""
        return "*" if self.name is None else "?"


@dataclass(frozen=True, slots=True)
class ValueEnd:
    """What ends a value: whitespace, a tag, and what is written after it."""

    padding: str
    tag: str
    after: str


def parameters_of(tool: Tool) -> list[Parameter]:
    """Returns the parameters of a tool in the order in which they are written.

    Raises:
        DataError: the schema has a keyword that separate parameters cannot honour.
    """
    schema = tool.schema
    if schema.get("type") not in ("object", ["object"]):
        raise _refusal(tool, "type", "the parameters of a tool are an object")
    for keyword in schema:
        if keyword not in _ROOT and not keyword.startswith("x-"):
            raise _refusal(tool, keyword, "this model writes each parameter apart")
    properties = schema.get("properties") or {}
    required = schema.get("required") or []
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        raise _refusal(tool, "properties", "expected an object, and a list of required names")
    others = schema.get("additionalProperties", True)
    found = [Parameter(n, each, n in required) for n, each in properties.items()]
    found += [Parameter(n, others, True) for n in required if n not in properties]
    if not found and others is not False:
        found.append(Parameter(None, others, False))
    return found


def value_rule(lark: Lark, name: str, parameter: Parameter, tool: Tool, end: ValueEnd) -> str:
    """Adds the rules of a value with its end, and returns its expression.

    Args:
        lark: receives the rules.
        name: name of the rule.
        parameter: the parameter.
        tool: its tool.
        end: what ends the value.

    Raises:
        DataError: the schema has a keyword that plain text cannot honour.
    """
    types = types_of(parameter.schema, tool.schema)
    if types is not None and "string" not in types:
        return f"{_json_value(lark, name, parameter, tool)} {_end(lark, end)}"
    options = list[str]()
    for number, branch in enumerate(branches(parameter.schema, tool.schema)):
        kinds = types_of(branch, tool.schema)
        if kinds is None or "string" in kinds:
            options.append(_string(lark, f"{name}_{number}", branch, tool, end))
    return options[0] if len(options) == 1 else f"({' | '.join(options)})"


def _json_value(lark: Lark, name: str, parameter: Parameter, tool: Tool) -> str:
    root = {key: tool.schema[key] for key in _DEFINITIONS if key in tool.schema}
    return lark.schema(name, {**root, **parameter.schema})


def _end(lark: Lark, end: ValueEnd) -> str:
    parts = [quoted(end.padding)] if end.padding else []
    return " ".join([*parts, lark.mark(end.tag), *([quoted(end.after)] if end.after else [])])


def _string(lark: Lark, name: str, schema: Json, tool: Tool, end: ValueEnd) -> str:
    """Returns the expression of a string with its end."""
    schema = schema if isinstance(schema, Mapping) else {}
    unknown = [key for key in schema if key not in _STRING and not key.startswith("x-")]
    if unknown:
        raise _refusal(tool, unknown[0], "this model writes text as it is, not as JSON")
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list) or not values:
            raise _refusal(tool, "enum", "expected a list of values")
        texts = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        if any(end.tag in text for text in texts):
            raise _refusal(tool, "enum", f"a value contains {end.tag!r}")
        listed = " | ".join(map(quoted, texts))
        return f"({listed}) {_end(lark, end)}"
    conditions = [f"/{pattern}/" for pattern in _patterns(schema, tool)]
    value = lark.add(f"{name.upper()}_ANY", " & ".join(["TEXT", *conditions]))
    value = lark.without(name.upper(), [containing(end.tag)], value)
    if lark.is_token(end.tag):
        return f"{value} {_end(lark, end)}"
    return lark.add(f"{name}_text", f"{value} {_end(lark, end)}", "[lazy]")


def _patterns(schema: JsonMapping, tool: Tool) -> list[str]:
    """Returns regular expressions that a string must match, each as a whole."""
    found = list[str]()
    least, most = schema.get("minLength"), schema.get("maxLength")
    for keyword, length in (("minLength", least), ("maxLength", most)):
        if length is not None and (type(length) is not int or length < 0):
            raise _refusal(tool, keyword, "expected a number of characters")
    if least is not None or most is not None:
        found.append(f"(?s:.{{{least or 0},{'' if most is None else most}}})")
    if "pattern" in schema:
        try:
            found.append(_searched(schema["pattern"]))
        except (ValueError, TypeError, AttributeError) as error:
            raise _refusal(tool, "pattern", str(error)[:200]) from None
    if "format" in schema:
        known = FORMATS.get(schema["format"]) if isinstance(schema["format"], str) else None
        if known is None:
            raise _refusal(tool, "format", f"the format {schema['format']!r} is not supported")
        found.append(known)
    return found


def _searched(pattern: str) -> str:
    """Returns the regular expression of all texts in which a pattern is found."""
    from llguidance import regex_to_lark  # loaded only for the schemas that need it

    options = list[str]()
    for option in _alternatives(pattern):
        begin = "" if option.startswith("^") else "(?s:.*)"
        ends = option.endswith("$") and not option.endswith("\\$")
        core = option.removeprefix("^")[: -1 if ends else None]
        options.append(f"{begin}({regex_to_lark(core, use_ascii='dw')}){'' if ends else '(?s:.*)'}")
    return "|".join(options)


def _alternatives(pattern: str) -> list[str]:
    """Returns the alternatives of a regular expression that are not inside a group."""
    found, depth, in_class, at = [""], 0, False, 0
    while at < len(pattern):
        piece = pattern[at : at + 2] if pattern[at] == "\\" else pattern[at]
        at += len(piece)
        if piece == "|" and not depth and not in_class:
            found.append("")
            continue
        found[-1] += piece
        if in_class:
            in_class = piece != "]"
        elif piece == "[":
            in_class = True
        else:
            depth += (piece == "(") - (piece == ")")
    return found


def _refusal(tool: Tool, keyword: str, reason: str) -> DataError:
    return DataError(
        f"the schema of the tool {tool.name!r} has the keyword {keyword!r}, which cannot be "
        f"honoured: {reason}; leave it out"
    )
