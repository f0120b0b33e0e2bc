"""Tools for models whose chat template does not show them.

The tools are described in the system message, calls are written as in Hermes' format, and results
are messages of the user:

    system      # Tools ... <tools>\\n{"type": "function", ...}\\n</tools> ...
    assistant   <tool_call>\\n{"name": "add", "arguments": {"a": 1}}\\n</tool_call>
    user        <tool_response>\\n4\\n</tool_response>
"""

import json
from collections.abc import Mapping, Sequence

from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.tokenizer.messages import normalise_messages
from easyllm.tokenizer.tool_calls.base import Conversation
from easyllm.tokenizer.tool_calls.json_objects import JsonObjects
from easyllm.tokenizer.tool_calls.known import HERMES

_BEGIN = "# Tools\n\nYou can call these functions:\n<tools>\n"
_END = (
    "\n</tools>\n\nTo call a function, write its name and arguments as a JSON object between "
    'these tags:\n<tool_call>\n{"name": <name of the function>, "arguments": <object>}\n'
    "</tool_call>\nThe results follow between <tool_response> tags."
)


class PlainCalls(JsonObjects):
    """The format for chat templates without tools.

    Args:
        added: ids of the tokenizer's added tokens by their names.
        has_system: whether the template renders system messages; otherwise the tools are described
            in the first message of the user.
    """

    native = False

    def __init__(self, added: Mapping[str, int], *, has_system: bool = True) -> None:
        super().__init__("plain", HERMES, added)
        self._has_system = has_system

    def prepare(
        self, messages: Sequence[JsonObject], tools: Sequence[JsonObject] | None
    ) -> Conversation:
        """Returns messages that describe the tools, their calls and results in text; no tools.

        Raises:
            DataError: the messages are malformed.
        """
        found = list[JsonObject]()
        for message in normalise_messages(messages):
            if message["role"] == "tool":
                _add_result(found, message)
            else:
                found.append(_written(message))
        if tools:
            self._describe(found, tools)
        return found, None

    def _describe(self, messages: list[JsonObject], tools: Sequence[JsonObject]) -> None:
        """Adds the description of the tools to the first message of a role that can carry it."""
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = f"{_BEGIN}{listed}{_END}"
        role = "system" if self._has_system else "user"
        first = messages[0] if messages else None
        if first is not None and first["role"] in ("system", role):
            parts = (
                [first["content"], text] if first["role"] == "system" else [text, first["content"]]
            )
            messages[0] = first | {"content": "\n\n".join(part for part in parts if part)}
        else:
            messages.insert(0, {"role": role, "content": text})


def _written(message: JsonMapping) -> JsonObject:
    """Returns a message with its calls in its content."""
    found = {key: value for key, value in message.items() if key != "tool_calls"}
    calls = [
        f"<tool_call>\n{json.dumps(_call(each), ensure_ascii=False)}\n</tool_call>"
        for each in message.get("tool_calls") or []
    ]
    if calls:
        content = [message["content"]] if message["content"] else []
        found["content"] = "\n".join([*content, *calls])
    return found


def _call(call: JsonMapping) -> JsonObject:
    function = call["function"]
    return {"name": function["name"], "arguments": function["arguments"]}


def _add_result(messages: list[JsonObject], message: JsonMapping) -> None:
    """Adds a result; results that follow each other are one message."""
    text = f"<tool_response>\n{message['content']}\n</tool_response>"
    last = messages[-1] if messages else {}
    if last.get("role") == "user" and last["content"].endswith("</tool_response>"):
        messages[-1] = {"role": "user", "content": f"{last['content']}\n{text}"}
    else:
        messages.append({"role": "user", "content": text})
