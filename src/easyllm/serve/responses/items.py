"""Input items of the Responses API, and their conversion to messages for chat templates."""

from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticCustomError

from easyllm.core.json_types import Json, JsonMapping, JsonObject
from easyllm.serve.constraints import TEXT, described_object

MAX_ITEMS = 4_000
_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("input_text", "output_text", "text")
_CALL_FIELDS = {"function_call": ("call_id", "name", "arguments")}
_MEDIA = {
    "input_image": "images are",
    "input_file": "files are",
    "input_audio": "audio is",
}

_TEXT_SCHEMA: JsonObject = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "anyOf": [
                    described_object(type={"enum": [*_TEXTS]}, text=TEXT),
                    described_object(type={"const": "refusal"}, refusal=TEXT),
                ]
            },
        },
    ]
}
_REASONING_SCHEMA = described_object(type={"const": "reasoning"})
_REASONING_SCHEMA["properties"]["content"] = {
    "type": ["array", "null"],
    "items": {"type": "object", "properties": {"text": TEXT}},
}
_MESSAGE_SCHEMA = described_object(role={"enum": [*_ROLES]}, content=_TEXT_SCHEMA)
_MESSAGE_SCHEMA["properties"]["type"] = {"enum": ["message", None]}
_ITEM_SCHEMAS = [
    _MESSAGE_SCHEMA,
    described_object(type={"const": "function_call"}, call_id=TEXT, name=TEXT, arguments=TEXT),
    described_object(type={"const": "function_call_output"}, call_id=TEXT, output=_TEXT_SCHEMA),
    described_object(type={"const": "item_reference"}, id=TEXT),
    _REASONING_SCHEMA,
]
INPUT_SCHEMA: JsonObject = {
    "anyOf": [
        TEXT,
        {
            "type": "array",
            "items": {"anyOf": _ITEM_SCHEMAS},
            "minItems": 1,
            "maxItems": MAX_ITEMS,
        },
    ]
}
"""What `read_input` accepts, as JSON Schema."""


def read_input(value: object) -> Json:
    """Returns the items of an `input`, checked; text becomes a user message.

    Validated by hand, because pydantic reports the errors of every member of a union.
    """
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise _mistake("the input is not text or a list of items; send one of them")
    if len(value) > MAX_ITEMS:
        raise _mistake(f"the input has {len(value)} items; the maximum is {MAX_ITEMS}")
    return [_checked(item, f"item {number}") for number, item in enumerate(value)]


def template_messages(items: list[JsonObject]) -> list[JsonObject]:
    """Returns the items as messages in the form of chat completions.

    Reasoning, text and function calls that follow each other are one assistant message.
    """
    messages: list[JsonObject] = []
    for item in items:
        kind = item["type"]
        if kind == "function_call_output":
            messages.append(
                {
                    "role": "tool",
                    "content": _text(item["output"]),
                    "tool_call_id": item.get("call_id"),
                }
            )
        elif kind == "message" and item["role"] != "assistant":
            messages.append({"role": item["role"], "content": _text(item["content"])})
        else:
            _extend_turn(messages, item)
    return messages


def _extend_turn(messages: list[JsonObject], item: JsonMapping) -> None:
    """Adds an item to the assistant message at the end, or begins one if it has no place there."""
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    kind = item["type"]
    if kind == "reasoning":
        text = "".join(part.get("text", "") for part in item.get("content") or ())
        if text:
            messages.append({"role": "assistant", "content": "", "reasoning_content": text})
        return
    if kind == "function_call":
        if last is None:
            last = {"role": "assistant", "content": ""}
            messages.append(last)
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        last.setdefault("tool_calls", []).append(call)
        return
    text = _text(item["content"])
    if last is not None and not last["content"] and "tool_calls" not in last:
        last["content"] = text
    else:
        messages.append({"role": "assistant", "content": text})


def _checked(item: Json, here: str) -> JsonObject:
    """Returns an item with its type; refuses one that is malformed or not supported."""
    if not isinstance(item, Mapping):
        raise _mistake(f"{here} of the input is not an object; send an item")
    kind: Any = item.get("type")
    if kind is None and "role" in item:
        kind = "message"
    if kind == "message":
        if item.get("role") not in _ROLES:
            raise _mistake(f"{here} of the input has no role of {', '.join(_ROLES)}")
        _check_content(item.get("content"), here)
    elif kind == "function_call":
        for name in _CALL_FIELDS[kind]:
            if not isinstance(item.get(name), str):
                raise _mistake(f"{here} of the input, a function_call, has no {name}; send it")
    elif kind == "function_call_output":
        if not isinstance(item.get("call_id"), str):
            raise _mistake(f"{here} of the input, a function_call_output, has no call_id; send it")
        _check_content(item.get("output"), here)
    elif kind == "reasoning":
        parts = item.get("content")
        if parts is not None and not _are_texts(parts):
            raise _mistake(f"{here} of the input has reasoning that is not text; leave it out")
    elif kind == "item_reference":
        if not isinstance(item.get("id"), str):
            raise _mistake(f"{here} of the input, an item_reference, has no id; send it")
    else:
        raise _mistake(
            f"{here} of the input is of type {kind!r}, which is not supported; send message, "
            "function_call, function_call_output, reasoning or item_reference"
        )
    return {**item, "type": kind}


def _check_content(content: Json, here: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise _mistake(f"{here} of the input has no text; send text or a list of parts")
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        place = f"part {number} of {here} of the input"
        if isinstance(kind, str) and kind in _MEDIA:
            raise _mistake(f"{place} is of type {kind!r}: {_MEDIA[kind]} not supported; send text")
        key = "refusal" if kind == "refusal" else "text"
        if kind not in (*_TEXTS, "refusal") or not isinstance(part.get(key), str):
            raise _mistake(f"{place} is not text; send input_text or output_text")


def _are_texts(parts: Json) -> bool:
    return isinstance(parts, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text", ""), str) for part in parts
    )


def _text(content: Json) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text") or part.get("refusal") or "" for part in content)


def _mistake(message: str) -> PydanticCustomError:
    return PydanticCustomError("content_value", "{message}", {"message": message})
