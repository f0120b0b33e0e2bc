"""`POST /v1/chat/completions`: writes the output of a job in OpenAI's format.

The response is a single JSON object, or a stream of server-sent events.
"""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from easyllm.core.json_types import JsonObject
from easyllm.serve.content_tokens import ContentToken
from easyllm.serve.errors import error_body
from easyllm.serve.json_text import JSONResponse
from easyllm.serve.openai.chat_answers import (
    AssistantMessage,
    CalledFunctionAnswer,
    ChatCompletion,
    Choice,
    ToolCallAnswer,
    usage,
)
from easyllm.serve.openai.chat_request import ChatRequest
from easyllm.serve.openai.logprobs import ChoiceLogprobs, choice_logprobs
from easyllm.serve.output import (
    CallBegin,
    CallDelta,
    ChoiceEnd,
    Generated,
    OutputEvent,
    ReasoningDelta,
    TextDelta,
)
from easyllm.serve.service import EngineFailure
from easyllm.serve.sse import DONE, sse
from easyllm.tokenizer.tokenizer import Tokenizer


def head_of(request: ChatRequest) -> JsonObject:
    """Returns the fields shared by all chunks of a stream and by a whole response."""
    head: JsonObject = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": request.model,
    }
    if request.service_tier is not None:
        head["service_tier"] = "default"
    return head


@dataclass(slots=True)
class _Message:
    """A choice while its events arrive."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCallAnswer] = field(default_factory=list)
    tokens: list[ContentToken] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, event: OutputEvent) -> None:
        """Adds an event."""
        match event:
            case TextDelta():
                self.text += event.text
                self.tokens += event.tokens
            case ReasoningDelta():
                self.reasoning += event.text
            case CallBegin():
                function = CalledFunctionAnswer(name=event.name, arguments="")
                self.calls.append(ToolCallAnswer(id=event.id, function=function))
            case CallDelta():
                self.calls[event.call].function.arguments += event.text
            case ChoiceEnd():
                self.finish_reason = event.reason

    def choice(self, index: int, logprobs: ChoiceLogprobs | None) -> JsonObject:
        """Returns the choice; fields of reasoning and tool calls only if there are any."""
        message = AssistantMessage(
            content=self.text if self.text or not self.calls else None,
            reasoning_content=self.reasoning or None,
            tool_calls=self.calls or None,
        )
        body = Choice(
            index=index, message=message, logprobs=logprobs, finish_reason=self.finish_reason
        ).model_dump()
        for name in ("reasoning_content", "tool_calls"):
            if body["message"][name] is None:
                del body["message"][name]
        return body


async def whole(request: ChatRequest, generated: Generated, tokenizer: Tokenizer) -> Response:
    """Returns all choices in one response, with their usage."""
    head = head_of(request)
    messages: dict[int, _Message] = {}
    async for events in generated.events:
        for event in events:
            messages.setdefault(event.index, _Message()).take(event)

    def logprobs(message: _Message) -> ChoiceLogprobs | None:
        if not request.logprobs:
            return None
        return choice_logprobs(message.tokens, tokenizer, details=bool(request.token_details))

    body = ChatCompletion(**head, choices=[], usage=usage(generated.counts)).model_dump()
    if "service_tier" not in head:
        del body["service_tier"]
    body["choices"] = [
        message.choice(index, logprobs(message)) for index, message in sorted(messages.items())
    ]
    return JSONResponse(body)


async def stream(
    request: ChatRequest, generated: Generated, tokenizer: Tokenizer
) -> AsyncIterator[str]:
    """Yields server-sent events; if usage is requested, it is null until the final chunk.

    With `continuous_usage_stats`, every chunk has the token counts so far.
    """
    writer = _Writer(request, generated, tokenizer)
    try:
        async for events in generated.events:
            yield "".join(chunk for event in events for chunk in writer.chunks(event))
    except EngineFailure as error:
        yield sse(error_body(error.status, str(error)))
        return
    if request.wants_usage:
        yield writer.chunk([], with_usage=True)
    yield DONE


class _Writer:
    """Writes the chunks of a stream."""

    def __init__(self, request: ChatRequest, generated: Generated, tokenizer: Tokenizer) -> None:
        self._request, self._generated, self._tokenizer = request, generated, tokenizer
        self._head = {**head_of(request), "object": "chat.completion.chunk"}
        self._begun = set[int]()

    def chunks(self, event: OutputEvent) -> list[str]:
        """Returns the chunks of an event: the first of a choice is preceded by its role."""
        found = []
        if event.index not in self._begun:
            self._begun.add(event.index)
            found.append(self._choice(event.index, {"role": "assistant", "content": ""}))
        match event:
            case TextDelta():
                logprobs = self._logprobs(event.tokens)
                found.append(self._choice(event.index, {"content": event.text}, **logprobs))
            case ReasoningDelta():
                found.append(self._choice(event.index, {"reasoning_content": event.text}))
            case CallBegin():
                function = {"name": event.name, "arguments": ""}
                call = {"index": event.call, "id": event.id, "type": "function"}
                found.append(
                    self._choice(event.index, {"tool_calls": [{**call, "function": function}]})
                )
            case CallDelta():
                call = {"index": event.call, "function": {"arguments": event.text}}
                found.append(self._choice(event.index, {"tool_calls": [call]}))
            case ChoiceEnd():
                found.append(self._choice(event.index, {}, finish_reason=event.reason))
        return found

    def chunk(self, choices: list[JsonObject], *, with_usage: bool = False) -> str:
        """Returns a chunk with the choices."""
        value = {**self._head, "choices": choices}
        if self._request.wants_usage:
            shown = with_usage or self._request.wants_running_usage
            value["usage"] = usage(self._generated.counts).model_dump() if shown else None
        return sse(value)

    def _choice(self, index: int, delta: JsonObject, **others: Any) -> str:
        return self.chunk([{"index": index, "delta": delta, "finish_reason": None} | others])

    def _logprobs(self, tokens: Sequence[ContentToken]) -> JsonObject:
        if not self._request.logprobs:
            return {}
        details = bool(self._request.token_details)
        found = choice_logprobs(tokens, self._tokenizer, details=details)
        return {"logprobs": found.model_dump()}
