"""Messages of a chat request, and their conversion to the input of chat templates."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from easyllm.core.json_types import Json, JsonObject
from easyllm.serve.openai.tools import CalledFunction, ToolCall
from easyllm.serve.treatment import Refused
from easyllm.tokenizer import normalise_messages

_PARTS = {
    "image_url": "images are",
    "input_audio": "audio is",
    "file": "files are",
}
"""Content types of OpenAI's schema other than text."""
_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
        {"type": "null"},
    ]
}
_NEEDS_CONTENT: JsonDict = {
    "anyOf": [
        {"properties": {"role": {"const": "assistant"}}},
        {"properties": {"content": {"type": ["string", "array"]}}, "required": ["content"]},
    ]
}


class ChatMessage(BaseModel):
    """A message, whose content is text or a list of text parts, which are joined.

    Fields that are not declared here are ignored, so that a response can be sent back unchanged.

    `name` and `reasoning_content` are passed to the chat template with the rest of the message, as
    `transformers` does; the template decides whether the model sees them.
    """

    model_config = ConfigDict(strict=True, extra="ignore", json_schema_extra=_NEEDS_CONTENT)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"] = Field(
        description="Author of the message."
    )
    content: Annotated[Any, WithJsonSchema(_CONTENT_SCHEMA)] = Field(
        None,
        validate_default=True,
        description="Text, or a list of text parts, which are joined; null only in an assistant "
        "message.",
    )
    name: str | None = Field(
        None, description="Name of the author; the chat template decides whether the model sees it."
    )
    reasoning_content: str | None = Field(
        None,
        description="Reasoning of an assistant message; the chat template decides whether the "
        "model sees it.",
    )
    refusal: str | None = Field(None, description="Refusal of an assistant message.")
    tool_calls: list[ToolCall] | None = Field(
        None, description="Tool calls of an assistant message."
    )
    tool_call_id: str | None = Field(
        None, description="Id of the call whose result a tool message contains."
    )
    function_call: CalledFunction | None = Field(
        None, description="Older form of one tool call in an assistant message."
    )
    audio: Annotated[None, Refused("audio is not supported")] = None

    @field_validator("content")
    @classmethod
    def _is_text(cls, content: object, info: ValidationInfo) -> Json:
        """Validated by hand, because pydantic reports the errors of every member of a union."""
        if content is None and info.data.get("role") in ("assistant", None):
            return content
        if not isinstance(content, str | list):
            kind = "null or missing" if content is None else "of another type"
            raise _mistake(f"the content is {kind}; send text or a list of text parts")
        if isinstance(content, list):
            for number, part in enumerate(content):
                _check_part(number, part)
        return content


def template_messages(messages: Iterable[ChatMessage]) -> list[JsonObject]:
    """Returns the messages in the form in which `encode_chat` passes them to chat templates."""
    return normalise_messages([message.model_dump(exclude_none=True) for message in messages])


def _check_part(number: int, part: Json) -> None:
    """Rejects a content part that is not text; the error names its type."""
    here = f"part {number} of the content"
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind in _PARTS:
        raise _mistake(f"{here} is of type {kind!r}: {_PARTS[kind]} not supported; send text")
    if kind != "text" or not isinstance(part.get("text"), str):
        raise _mistake(f'{here} is not text; send {{"type": "text", "text": "..."}}')


def _mistake(message: str) -> PydanticCustomError:
    return PydanticCustomError("content_value", "{message}", {"message": message})
