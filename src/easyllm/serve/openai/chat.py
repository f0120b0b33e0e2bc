"""`POST /v1/chat/completions`: runs a request on the engine and formats its events.

The response is a single JSON object, or a stream of server-sent events.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse
from starlette.responses import Response

from easyllm.core.json_types import JsonObject
from easyllm.engine.llm import LLM, Completion
from easyllm.engine.request import Request, TokenEvent
from easyllm.serve.openai.chat_answers import (
    AssistantMessage,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    Usage,
    usage,
)
from easyllm.serve.errors import error_body
from easyllm.serve.logprobs import ContentToken, ContentTokens, choice_logprobs
from easyllm.serve.openai.messages import template_messages
from easyllm.serve.openai.chat_request import ChatRequest
from easyllm.serve.service import EngineFailure, EngineService


@dataclass(slots=True)
class _Answer:
    """State of a request's completions while their events arrive.

    Attributes:
        head: fields shared by all chunks and by the non-streaming response.
        prompt_tokens: number of tokens of the rendered conversation.
        content: maps each choice to the tracker of its content tokens; filled only when
            log-probabilities are requested.
    """

    request: ChatRequest
    llm: LLM
    head: JsonObject
    prompt_tokens: int
    content: dict[int, ContentTokens] = field(default_factory=dict)

    def take(self, event: TokenEvent) -> tuple[str, list[ContentToken]]:
        """Returns the text an event adds to its choice, and its tokens if they are requested."""
        if not self.request.logprobs:
            return event.text, []
        if event.index not in self.content:
            ends = self.llm.model.config.eos_token_ids
            self.content[event.index] = ContentTokens(self.llm.tokenizer, ends)
        return self.content[event.index].push(event)

    def logprobs(self, tokens: Sequence[ContentToken]) -> ChoiceLogprobs | None:
        """Returns the tokens' log-probabilities in OpenAI's format, or None if not requested."""
        return choice_logprobs(tokens, self.llm.tokenizer) if self.request.logprobs else None


async def answer_chat(
    request: ChatRequest, service: EngineService, *, adapter: str = ""
) -> Response:
    """Returns the response to a chat request, complete or streamed.

    A stream is returned only after its first event, so that a rejected request still gets an error
    status.

    Args:
        adapter: the adapter of the model to use; empty for the base model.

    Raises:
        EasyllmError: the template or the engine rejects the request.
        EngineFailure: an engine step failed, or the server is shutting down.
    """
    llm = service.llm
    # Encoding a long conversation takes seconds; a thread keeps other clients' tokens flowing.
    prompt = await asyncio.to_thread(llm.encode_chat, template_messages(request.messages))
    events = service.generate(
        Request(prompt_ids=tuple(prompt), params=request.sampling(), adapter=adapter)
    )
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": request.model,
    }
    if request.service_tier is not None:
        head["service_tier"] = "default"
    answer = _Answer(request, llm, head, len(prompt))
    if request.stream:
        first = await anext(events)
        return StreamingResponse(_stream(answer, first, events), media_type="text/event-stream")
    return await _whole(answer, events)


async def _whole(answer: _Answer, events: AsyncIterator[TokenEvent]) -> Response:
    """Returns all choices in one response, with their usage."""
    completion, tokens = Completion(), dict[int, list[ContentToken]]()
    async for event in events:
        completion.take(event)
        tokens.setdefault(event.index, []).extend(answer.take(event)[1])
    completions = [completion, *completion.others]
    choices = [
        Choice(
            index=index,
            message=AssistantMessage(content=each.text),
            logprobs=answer.logprobs(tokens.get(index, [])),
            finish_reason=each.finish_reason,
        )
        for index, each in enumerate(completions)
    ]
    generated = sum(len(each.token_ids) for each in completions)
    whole = ChatCompletion(
        **answer.head, choices=choices, usage=usage(answer.prompt_tokens, generated)
    )
    body = whole.model_dump()
    if "service_tier" not in answer.head:
        del body["service_tier"]
    return JSONResponse(body)


async def _stream(
    answer: _Answer, first: TokenEvent, rest: AsyncIterator[TokenEvent]
) -> AsyncIterator[str]:
    """Yields server-sent events; if usage is requested, it is null until the final chunk."""
    wants_usage = answer.request.wants_usage

    def chunk(choices: list[JsonObject], total: Usage | None = None) -> str:
        value = {**answer.head, "object": "chat.completion.chunk", "choices": choices}
        if wants_usage:
            value["usage"] = None if total is None else total.model_dump()
        return _event(value)

    def choice(index: int, delta: dict[str, str], **others: Any) -> str:
        return chunk([{"index": index, "delta": delta, "finish_reason": None} | others])

    count, begun = 0, set[int]()
    event: TokenEvent | None = first
    while event is not None:
        if event.index not in begun:
            begun.add(event.index)
            yield choice(event.index, {"role": "assistant", "content": ""})
        count += event.token_id is not None
        text, tokens = answer.take(event)
        if text:
            details = answer.logprobs(tokens)
            logprobs = {} if details is None else {"logprobs": details.model_dump()}
            yield choice(event.index, {"content": text}, **logprobs)
        if event.finish_reason is not None:
            yield choice(event.index, {}, finish_reason=event.finish_reason)
        try:
            event = await anext(rest, None)
        except EngineFailure as error:
            yield _event(error_body(error.status, str(error)))
            return
    if wants_usage:
        yield chunk([], usage(answer.prompt_tokens, count))
    yield "data: [DONE]\n\n"


def _event(value: JsonObject) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
