"""Chat templates that write the arguments of tool calls as they are, and so need them as JSON text.

Most templates apply `tojson` to an object of arguments. Some (DeepSeek's, Phi-4-mini's) join them
to other text, which fails for an object, or print them, which writes Python's notation.
"""

import json
from collections.abc import Callable, Sequence

from easyllm.core.errors import DataError
from easyllm.core.json_types import JsonMapping, JsonObject

_ARGUMENTS = {"place": "Paris", "is_far": True}


def needs_text(render: Callable[[list[JsonObject]], str]) -> bool:
    """Returns whether a template must be given arguments as text.

    Args:
        render: renders messages in the form of `normalise_messages`.
    """
    text = json.dumps(_ARGUMENTS)
    return not _writes(render, _ARGUMENTS) and _writes(render, text)


def as_text(messages: Sequence[JsonMapping]) -> list[JsonObject]:
    """Returns messages whose tool calls have arguments as JSON text."""
    return [
        dict(message)
        if not message.get("tool_calls")
        else {**message, "tool_calls": [_as_text(call) for call in message["tool_calls"]]}
        for message in messages
    ]


def _as_text(call: JsonMapping) -> JsonObject:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _writes(render: Callable[[list[JsonObject]], str], arguments: object) -> bool:
    """Whether a template renders a call without an error and with the arguments as JSON.

    A template that writes each argument apart writes no JSON, but none of Python's notation either.
    """
    call = {
        "id": "abcdef123",
        "type": "function",
        "function": {"name": "look_up", "arguments": arguments},
    }
    messages: list[JsonObject] = [
        {"role": "user", "content": "How far is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        text = render(messages)
    except DataError:
        return False
    return "look_up" in text and str(_ARGUMENTS) not in text
