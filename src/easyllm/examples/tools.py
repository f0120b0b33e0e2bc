"""Reads the tools and tool calls of a row, which may be JSON text at several levels."""

import json

from easyllm.core.errors import DataError
from easyllm.core.json_types import Json, JsonObject
from easyllm.corpus.files.row import Row
from easyllm.tokenizer.messages import Message, read_arguments


def read_tools(row: Row) -> list[JsonObject] | None:
    """Returns the tools that a row offers under `tools` or `functions`, or None if there are none.

    The list, and each tool in it, may be given as JSON text.

    Raises:
        DataError: the tools are not valid JSON, or not a list of objects.
    """
    key = "tools" if row.values.get("tools") else "functions"
    tools = row.values.get(key)
    try:
        tools = _from_json(tools)
        tools = [_read_tool(tool) for tool in tools] if isinstance(tools, list) else tools
    except ValueError:
        raise DataError(f"{row.location}: {key} is not JSON; give a list of functions") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict) and isinstance(tool.get("function", tool), dict) for tool in tools
    ):
        raise DataError(f"{row.location}: {key} is not a list of functions; give each as an object")
    return tools


def _read_tool(tool: Json) -> Json:
    """Returns a tool as an object, including its parameters.

    Tables often store both as JSON text, because they cannot store the objects.
    """
    tool = _from_json(tool) if isinstance(tool, str) and tool.lstrip()[:1] == "{" else tool
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("parameters"), str):
        return tool
    function = function | {"parameters": _from_json(function["parameters"])}
    return tool | {"function": function} if "function" in tool else function


def _from_json(value: object) -> Json:
    if not isinstance(value, str):
        return value
    return json.loads(value) if value.strip() else None


def read_function_call(value: object, row: Row, name: str, role: str = "function_call") -> Message:
    """Returns a tool-call turn as a message.

    Args:
        value: one call or a list of calls, where each call and the list may be JSON text. A call is
            `{"name": ..., "arguments": ...}`, optionally under `function`.
        name: how errors refer to the turn.
        role: role of the turn in the row, for errors.

    Raises:
        DataError: the value is not a tool call.
    """
    try:
        call = _from_json(value)
        calls = [_from_json(c) for c in (call if isinstance(call, list) else [call])]
        calls = [c.get("function") or c for c in calls]
        if not calls or not all(isinstance(c["name"], str) for c in calls):
            raise TypeError
        functions = [
            {"name": c["name"], "arguments": read_arguments(c.get("arguments"))} for c in calls
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(
            f"{row.location}: {name} is a {role} without name and arguments as JSON; "
            'give it like {"name": "add", "arguments": {"a": 1}}'
        ) from None
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": f} for f in functions],
    }
