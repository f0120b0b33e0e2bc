"""Writes the output of a job in the format of the Responses API: an object, or a stream."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from easyllm.core.json_types import JsonObject
from easyllm.serve.content_tokens import ContentToken
from easyllm.serve.openai.logprobs import choice_logprobs
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
from easyllm.serve.responses.request import ResponseRequest
from easyllm.serve.service import EngineFailure
from easyllm.serve.sse import sse
from easyllm.tokenizer.tokenizer import Tokenizer


class ResponseWriter:
    """Collects the output of a job, and writes it as events while it arrives.

    Args:
        request: the request.
        counts: numbers of tokens of the job, which it updates.
        tokenizer: the tokenizer of the model.
        temperature: the temperature that applies.
        top_p: the top-p that applies.

    Attributes:
        body: the response so far.
    """

    def __init__(
        self,
        request: ResponseRequest,
        counts: Counts,
        tokenizer: Tokenizer,
        *,
        temperature: float,
        top_p: float,
    ) -> None:
        self._request, self._counts, self._tokenizer = request, counts, tokenizer
        self.body = _new_body(request, temperature=temperature, top_p=top_p)
        self._number = 0
        self._open: JsonObject | None = None
        self._reason = "stop"

    def begin(self) -> list[str]:
        """Returns the events that begin a stream."""
        return [self._event(f"response.{name}", response=self.body) for name in _BEGINNINGS]

    def take(self, event: OutputEvent) -> list[str]:
        """Adds a piece of output; returns its events."""
        match event:
            case TextDelta(text=text, tokens=tokens):
                begin = self._begin("message")
                part = self._item["content"][0]
                part["text"] += text
                logprobs = self._logprobs(tokens)
                part["logprobs"] += logprobs
                place = {**self._place(), "content_index": 0, "delta": text, "logprobs": logprobs}
                return [*begin, self._event("response.output_text.delta", **place)]
            case ReasoningDelta(text=text):
                begin = self._begin("reasoning")
                self._item["content"][0]["text"] += text
                place = {**self._place(), "content_index": 0, "delta": text}
                return [*begin, self._event("response.reasoning_text.delta", **place)]
            case CallBegin(id=call_id, name=name):
                return self._begin("function_call", call_id=call_id, name=name)
            case CallDelta(text=text):
                self._item["arguments"] += text
                place = {**self._place(), "delta": text}
                return [self._event("response.function_call_arguments.delta", **place)]
            case ChoiceEnd(reason=reason):
                self._reason = reason
                return []

    def end(self) -> list[str]:
        """Completes the response; returns the events that end a stream."""
        cut = self._reason == "length"
        events = self._close("incomplete" if cut else "completed")
        self.body["status"] = "incomplete" if cut else "completed"
        if cut:
            self.body["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.body["completed_at"] = int(time.time())
        self.body["usage"] = _usage(self._counts)
        return [*events, self._event(f"response.{self.body['status']}", response=self.body)]

    def fail(self, error: EngineFailure) -> list[str]:
        """Records a failure of the server; returns the events that end a stream."""
        self.body["status"] = "failed"
        self.body["error"] = {"code": "server_error", "message": str(error)}
        return [self._event("response.failed", response=self.body)]

    @property
    def _item(self) -> JsonObject:
        assert self._open is not None, "output is added to an open item only"
        return self._open

    def _begin(self, kind: str, **others: str) -> list[str]:
        """Returns the events that make an item of this type the open one."""
        if self._open is not None and self._open["type"] == kind != "function_call":
            return []
        closing = self._close("completed")
        item = self._open = _new_item(kind, **others)
        self.body["output"].append(item)
        shown = {**item, "content": []} if "content" in item else item
        index = len(self.body["output"]) - 1
        added = self._event("response.output_item.added", output_index=index, item=shown)
        if kind == "function_call":
            return [*closing, added]
        place = {**self._place(), "content_index": 0, "part": item["content"][0]}
        return [*closing, added, self._event("response.content_part.added", **place)]

    def _close(self, status: str) -> list[str]:
        """Returns the events that end the open item."""
        item, self._open = self._open, None
        if item is None:
            return []
        item["status"] = status
        place = {"item_id": item["id"], "output_index": len(self.body["output"]) - 1}
        if item["type"] == "function_call":
            arguments = {**place, "arguments": item["arguments"], "name": item["name"]}
            events = [self._event("response.function_call_arguments.done", **arguments)]
        else:
            part, name = item["content"][0], "reasoning_text"
            whole = {**place, "content_index": 0, "text": part["text"]}
            if item["type"] == "message":
                whole["logprobs"], name = part["logprobs"], "output_text"
            events = [
                self._event(f"response.{name}.done", **whole),
                self._event("response.content_part.done", **place, content_index=0, part=part),
            ]
        index = place["output_index"]
        return [*events, self._event("response.output_item.done", output_index=index, item=item)]

    def _place(self) -> JsonObject:
        return {"item_id": self._item["id"], "output_index": len(self.body["output"]) - 1}

    def _logprobs(self, tokens: Sequence[ContentToken]) -> list[JsonObject]:
        if not self._request.wants_logprobs:
            return []
        found: list[JsonObject] = choice_logprobs(tokens, self._tokenizer).model_dump()["content"]
        return found

    def _event(self, kind: str, **fields: Any) -> str:
        number, self._number = self._number, self._number + 1
        return sse({"type": kind, "sequence_number": number, **fields}, kind)


_BEGINNINGS = ("created", "in_progress")
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


def _new_item(kind: str, **others: str) -> JsonObject:
    """Returns an empty output item."""
    item: JsonObject = {
        "id": f"{_PREFIXES[kind]}_{uuid.uuid4().hex}",
        "type": kind,
        "status": "in_progress",
        **others,
    }
    if kind == "message":
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return {**item, "role": "assistant", "content": [part]}
    if kind == "reasoning":
        part = {"type": "reasoning_text", "text": ""}
        return {**item, "summary": [], "encrypted_content": None, "content": [part]}
    return {**item, "arguments": ""}


def _new_body(request: ResponseRequest, *, temperature: float, top_p: float) -> JsonObject:
    """Returns a response without output, which repeats the settings of the request."""
    text = {"type": "text"}
    if request.text is not None and request.text.format is not None:
        text = request.text.format.model_dump(by_alias=True, exclude_none=True)
    reasoning = None if request.reasoning is None else request.reasoning.effort
    choice = request.tool_choice or "auto"
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "model": request.model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": reasoning, "summary": None},
        "service_tier": "default",
        "store": request.store is not False,
        "temperature": temperature,
        "text": {"format": text, "verbosity": "medium"},
        "tool_choice": choice
        if isinstance(choice, str)
        else {"type": "function", "name": choice[0]},
        "tools": [
            {**tool.model_dump(), "strict": tool.strict is not False}
            for tool in request.tools or ()
        ],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": top_p,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
        "metadata": request.metadata or {},
    }


def _usage(counts: Counts) -> JsonObject:
    return {
        "input_tokens": counts.prompt,
        "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
        "output_tokens": counts.completion,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning},
        "total_tokens": counts.prompt + counts.completion,
    }


async def complete(writer: ResponseWriter, generated: Generated) -> JsonObject:
    """Returns the complete response."""
    async for events in generated.events:
        for event in events:
            writer.take(event)
    writer.end()
    return writer.body


async def stream(writer: ResponseWriter, generated: Generated) -> AsyncIterator[str]:
    """Yields the events of a stream."""
    yield "".join(writer.begin())
    try:
        async for events in generated.events:
            written = [text for event in events for text in writer.take(event)]
            if written:
                yield "".join(written)
    except EngineFailure as error:
        yield "".join(writer.fail(error))
        return
    yield "".join(writer.end())
