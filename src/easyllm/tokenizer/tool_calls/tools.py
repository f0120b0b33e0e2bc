"""Definitions of tools in OpenAI's form, and the choice among them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from easyllm.core.errors import DataError
from easyllm.core.json_types import Json, JsonMapping

ToolDefinitions: TypeAlias = Sequence[JsonMapping]
"""Tools: `{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}`.
"""
_EXAMPLE = '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}'


@dataclass(frozen=True, slots=True)
class OneTool:
    """The choice of a single tool, which must be called."""

    name: str


ToolChoice: TypeAlias = Literal["auto", "none", "required"] | OneTool
"""Whether the model calls a tool: as it decides, never, at least one, or a certain one."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that the model may call.

    Attributes:
        name: its name.
        schema: JSON Schema of its arguments; `{"type": "object"}` if it has none.
    """

    name: str
    schema: JsonMapping


def declared(tools: ToolDefinitions) -> dict[str, Tool]:
    """Returns the tools by name.

    Raises:
        DataError: a definition has no name or parameters that are not a schema, or two tools have
            the same name.
    """
    found = dict[str, Tool]()
    for number, definition in enumerate(tools):
        tool = _tool(definition, f"tool {number}")
        if tool.name in found:
            raise DataError(f"two tools are named {tool.name!r}; rename one of them")
        found[tool.name] = tool
    return found


def chosen(tools: ToolDefinitions, choice: ToolChoice) -> list[Tool]:
    """Returns the tools that may be called.

    Raises:
        DataError: there is none, or the chosen one is not declared; or as in `declared`.
    """
    found = declared(tools)
    if isinstance(choice, OneTool):
        if choice.name not in found:
            known = ", ".join(found) or "none"
            raise DataError(
                f"tool_choice names the tool {choice.name!r}, which is not among the tools "
                f"({known}); declare it, or choose another"
            )
        return [found[choice.name]]
    if not found:
        raise DataError(f"tool_choice is {choice!r}, but no tool is declared; give tools")
    return list(found.values())


def _tool(definition: Json, label: str) -> Tool:
    function = definition.get("function", definition) if isinstance(definition, Mapping) else {}
    function = function if isinstance(function, Mapping) else {}
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{label} has no name; give {_EXAMPLE}")
    schema = function.get("parameters")
    if schema is None or schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise DataError(
            f"the parameters of the tool {name!r} are a {type(schema).__name__}; "
            "give a JSON Schema object"
        )
    return Tool(name, schema if "type" in schema else {"type": "object", **schema})
