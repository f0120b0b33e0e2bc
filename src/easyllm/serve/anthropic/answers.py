"""Writes the output of a job in Anthropic's format: a message, or the events of a stream."""

import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.responses import Response

from easyllm.core.json_types import JsonObject
from easyllm.serve.errors import ANTHROPIC_PATH, error_body
from easyllm.serve.json_text import JSONResponse
from easyllm.serve.output import (
    CallBegin,
    CallDelta,
    ChoiceEnd,
    Counts,
    Generated,
    OutputEvent,
    ReasoningDelta,
    TextDelta,
)
from easyllm.serve.service import EngineFailure
from easyllm.serve.sse import sse

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
SIGNATURE = "none"
"""The signature of thinking blocks, which clients send back; nothing is signed here."""


def _usage(counts: Counts) -> JsonObject:
    """Returns the usage: as in Anthropic's API, input tokens exclude those from the cache."""
    return {
        "input_tokens": counts.prompt - counts.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cached,
        "output_tokens": counts.completion,
    }


def _message(model: str, counts: Counts) -> JsonObject:
    return {
        "id": f"msg_{uuid.uuid4().hex[:24]}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(counts),
    }


def _ending(end: ChoiceEnd) -> JsonObject:
    if isinstance(end.stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": end.stop}
    return {"stop_reason": _REASONS[end.reason], "stop_sequence": None}


async def whole(model: str, generated: Generated) -> Response:
    """Returns the complete message."""
    content, ending = list[JsonObject](), JsonObject()
    async for events in generated.events:
        for event in events:
            if isinstance(event, ChoiceEnd):
                ending = _ending(event)
            else:
                _extend(content, event)
    for block in content:
        if block["type"] == "tool_use":
            block["input"] = _arguments(block["input"])
    message = _message(model, generated.counts)
    return JSONResponse({**message, "content": content, **ending})


def _extend(content: list[JsonObject], event: OutputEvent) -> None:
    """Adds an event to the last block, or begins a new one."""
    last: JsonObject = content[-1] if content else {"type": None}
    match event:
        case TextDelta(text=text):
            if last["type"] != "text":
                last = {"type": "text", "text": ""}
                content.append(last)
            last["text"] += text
        case ReasoningDelta(text=text):
            if last["type"] != "thinking":
                last = {"type": "thinking", "thinking": "", "signature": SIGNATURE}
                content.append(last)
            last["thinking"] += text
        case CallBegin(id=call_id, name=name):
            content.append({"type": "tool_use", "id": call_id, "name": name, "input": ""})
        case CallDelta(text=text):
            last["input"] += text


def _arguments(text: str) -> JsonObject:
    """Returns the arguments of a call; those that the token limit cut off are `{}`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


async def stream(model: str, generated: Generated) -> AsyncIterator[str]:
    """Yields the events of a stream, from `message_start` to `message_stop`."""
    writer = _Writer()
    yield _event({"type": "message_start", "message": _message(model, generated.counts)})
    ending = JsonObject()
    try:
        async for events in generated.events:
            written = list[str]()
            for event in events:
                if isinstance(event, ChoiceEnd):
                    ending = _ending(event)
                else:
                    written += writer.events(event)
            if written:
                yield "".join(written)
    except EngineFailure as error:
        yield sse(error_body(error.status, str(error), path=ANTHROPIC_PATH), "error")
        return
    last = {"type": "message_delta", "delta": ending, "usage": _usage(generated.counts)}
    yield "".join([*writer.end(), _event(last), _event({"type": "message_stop"})])


def _event(value: JsonObject) -> str:
    return sse(value, value["type"])


@dataclass(slots=True)
class _Writer:
    """Writes the events of content blocks.

    Attributes:
        index: number of the open block; -1 before the first.
        kind: type of the open block.
    """

    index: int = -1
    kind: str | None = None

    def events(self, event: OutputEvent) -> list[str]:
        """Returns the events of one piece of output, with those that open or close blocks."""
        match event:
            case TextDelta(text=text):
                begin = self._open("text", {"type": "text", "text": ""})
                return [*begin, self._delta({"type": "text_delta", "text": text})]
            case ReasoningDelta(text=text):
                begin = self._open(
                    "thinking", {"type": "thinking", "thinking": "", "signature": ""}
                )
                return [*begin, self._delta({"type": "thinking_delta", "thinking": text})]
            case CallBegin(id=call_id, name=name):
                tool_use = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                return self._open("tool_use", tool_use, anew=True)
            case CallDelta(text=text):
                return [self._delta({"type": "input_json_delta", "partial_json": text})]
            case _:
                return []

    def end(self) -> list[str]:
        """Returns the events that close the open block."""
        if self.kind is None:
            return []
        closing = [_event({"type": "content_block_stop", "index": self.index})]
        if self.kind == "thinking":
            signature = self._delta({"type": "signature_delta", "signature": SIGNATURE})
            closing.insert(0, signature)
        self.kind = None
        return closing

    def _open(self, kind: str, block: JsonObject, *, anew: bool = False) -> list[str]:
        """Returns the events that make a block of this type the open one."""
        if self.kind == kind and not anew:
            return []
        closing = self.end()
        self.index, self.kind = self.index + 1, kind
        start = {"type": "content_block_start", "index": self.index, "content_block": block}
        return [*closing, _event(start)]

    def _delta(self, delta: JsonObject) -> str:
        return _event({"type": "content_block_delta", "index": self.index, "delta": delta})
