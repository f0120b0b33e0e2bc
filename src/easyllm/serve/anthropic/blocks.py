"""Messages and content blocks of Anthropic's API, and their conversion for chat templates."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from easyllm.core.json_types import Json, JsonMapping, JsonObject
from easyllm.serve.constraints import TEXT, described_object

_MEDIA = {
    "image": "images are",
    "document": "documents are",
    "search_result": "search results are",
    "server_tool_use": "tools that run on the server are",
    "container_upload": "files are",
}
_TEXT_BLOCK = described_object(type={"const": "text"}, text=TEXT)
TEXTS_SCHEMA: JsonObject = {"anyOf": [TEXT, {"type": "array", "items": _TEXT_BLOCK}]}
"""Text, or a list of text blocks."""
_RESULT_BLOCK = described_object(type={"const": "tool_result"}, tool_use_id=TEXT)
_RESULT_BLOCK["properties"]["content"] = {"anyOf": [*TEXTS_SCHEMA["anyOf"], {"type": "null"}]}
_BLOCKS = [
    _TEXT_BLOCK,
    described_object(type={"const": "tool_use"}, id=TEXT, name=TEXT, input={"type": "object"}),
    _RESULT_BLOCK,
    described_object(type={"const": "thinking"}, thinking=TEXT),
    described_object(type={"const": "redacted_thinking"}),
]
_CONTENT_SCHEMA = {"anyOf": [TEXT, {"type": "array", "items": {"anyOf": _BLOCKS}}]}
Content = Annotated[Any, WithJsonSchema(_CONTENT_SCHEMA)]


class AnthropicMessage(BaseModel):
    """A message: text, or content blocks; fields that are not declared here are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["user", "assistant", "system"] = Field(description="Author of the message.")
    content: Content = Field(
        description="Text, or blocks: text, tool_use and thinking of the assistant, tool_result of "
        "the user."
    )

    @field_validator("content")
    @classmethod
    def _has_blocks(cls, content: object) -> Json:
        """Validated by hand, because pydantic reports the errors of every member of a union."""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise _mistake("the content is not text; send text or a list of content blocks")
        for number, block in enumerate(content):
            _check_block(block, f"block {number} of the content")
        return content


def text_of(content: Json) -> str:
    """Returns the text of a content that consists of text blocks only."""
    if isinstance(content, str):
        return content
    return "\n".join(block["text"] for block in content or ())


def template_message(message: AnthropicMessage) -> list[JsonObject]:
    """Returns a message in the form that chat templates expect.

    A user message with results of tools becomes one `tool` message for each result, followed by a
    `user` message with its text, if it has any.
    """
    content = message.content
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = "\n".join(block["text"] for block in blocks if block["type"] == "text")
    if message.role != "assistant":
        results: list[JsonObject] = [
            {
                "role": "tool",
                "content": text_of(block.get("content")),
                "tool_call_id": block["tool_use_id"],
            }
            for block in blocks
            if block["type"] == "tool_result"
        ]
        has_text = any(block["type"] == "text" for block in blocks) or not results
        return [*results, *([{"role": message.role, "content": text}] if has_text else [])]
    found: JsonObject = {"role": "assistant", "content": text}
    thinking = "\n".join(block["thinking"] for block in blocks if block["type"] == "thinking")
    if thinking:
        found["reasoning_content"] = thinking
    calls = [
        {
            "id": block["id"],
            "type": "function",
            "function": {"name": block["name"], "arguments": block["input"]},
        }
        for block in blocks
        if block["type"] == "tool_use"
    ]
    if calls:
        found["tool_calls"] = calls
    return [found]


_FIELDS: Mapping[str, Mapping[str, type]] = {
    "text": {"text": str},
    "tool_use": {"id": str, "name": str, "input": dict},
    "tool_result": {"tool_use_id": str},
    "thinking": {"thinking": str},
    "redacted_thinking": {},
}
"""The fields that a block of each type must have, with their types."""


def _check_block(block: Json, here: str) -> None:
    """Refuses a block that is malformed, or of a type that is not supported."""
    kind = block.get("type") if isinstance(block, Mapping) else None
    if isinstance(kind, str) and kind in _MEDIA:
        raise _mistake(f"{here} is of type {kind!r}: {_MEDIA[kind]} not supported; send text")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise _mistake(f"{here} has no known type; send one of {', '.join(_FIELDS)}")
    for name, expected in _FIELDS[kind].items():
        if not isinstance(block.get(name), expected):
            wanted = "an object" if expected is dict else "text"
            raise _mistake(f"{here} has no {name}, which is {wanted}; send it")
    if kind == "tool_result":
        _check_result(block, here)


def _check_result(block: JsonMapping, here: str) -> None:
    """Refuses the result of a tool that is not text."""
    content = block.get("content")
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise _mistake(f"{here} has a result that is not text; send text or a list of text blocks")
    for number, part in enumerate(content):
        place = f"part {number} of {here}"
        _check_block(part, place)
        if part["type"] != "text":
            raise _mistake(f"{place} is of type {part['type']!r}; the result of a tool is text")


def _mistake(message: str) -> PydanticCustomError:
    return PydanticCustomError("content_value", "{message}", {"message": message})
