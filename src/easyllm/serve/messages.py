"""The messages of a chat request, and as chat templates take them."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from easyllm.serve.treatment import Neutral, Refused, Strict
from easyllm.tokenizer import normalise_messages

_PARTS = {
    "image_url": "images are",
    "input_audio": "audio is",
    "file": "files are",
    "refusal": "refusals are",
}
"""What the published schema knows besides text."""
_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
                "additionalProperties": False,
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
NoCalls = Annotated[list[Any], Field(max_length=0)]


class ChatMessage(Strict):
    """A message; its content is text or a list of text parts, which are joined. What a client's own answer object holds
    besides (`refusal`, `annotations` ...) is accepted where it is empty, so that an answer can be sent back as it came.

    `name` is given to the chat template with the rest of the message, as `transformers` gives it: whether the model
    sees it is the template's choice.
    """

    model_config = ConfigDict(json_schema_extra=_NEEDS_CONTENT)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, WithJsonSchema(_CONTENT_SCHEMA)] = Field(None, validate_default=True)
    name: str | None = None
    refusal: Annotated[None, Refused("models here give none; send the text as content")] = None
    annotations: Annotated[
        Annotated[list[Any], Field(max_length=0)] | None,
        Neutral("[]", "annotations are not given to the model"),
    ] = None
    audio: Annotated[None, Refused("audio is not supported")] = None
    function_call: Annotated[None, Refused("tools are not supported")] = None
    tool_calls: Annotated[NoCalls | None, Neutral("[]", "tools are not supported")] = None
    tool_call_id: Annotated[None, Refused("tools are not supported")] = None
    parsed: Annotated[None, Refused("send the text as content")] = None

    @field_validator("content")
    @classmethod
    def _is_text(cls, content: Any, info: ValidationInfo) -> Any:
        """Checked by hand: the mistakes of a union would be those of each kind at once."""
        if content is None and info.data.get("role") in ("assistant", None):
            return content
        if not isinstance(content, str | list):
            kind = "null or missing" if content is None else "of another type"
            raise _mistake(f"the content is {kind}; send text or a list of text parts")
        if isinstance(content, list):
            for number, part in enumerate(content):
                _check_part(number, part)
        return content


def template_messages(messages: Iterable[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as training and `encode_chat` give them to chat templates."""
    return normalise_messages(
        [{"role": m.role, "content": m.content, "name": m.name} for m in messages]
    )


def _check_part(number: int, part: Any) -> None:
    """Refuses a part that is not text, naming what it is."""
    here = f"part {number} of the content"
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind in _PARTS:
        raise _mistake(f"{here} is of type {kind!r}: {_PARTS[kind]} not supported; send text")
    if kind != "text" or not isinstance(part.get("text"), str):
        raise _mistake(f'{here} is not text; send {{"type": "text", "text": "..."}}')
    extra = [name for name in part if name not in ("type", "text") and part[name] is not None]
    if extra:
        raise _mistake(f"{here} has the field {extra[0]!r}, which is not supported; leave it out")


def _mistake(message: str) -> PydanticCustomError:
    return PydanticCustomError("content_value", "{message}", {"message": message})
