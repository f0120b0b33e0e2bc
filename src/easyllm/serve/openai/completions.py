"""`POST /v1/completions`: text that follows prompts, with log-probabilities and the prompt itself.

The log-probabilities contain every generated token, also the one that ends the completion, and with
`echo` every prompt token; only the first token of a text has none.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from starlette.responses import Response

from easyllm.core.json_types import JsonObject
from easyllm.engine.guide_spec import check_guided_params
from easyllm.engine.llm import LLM
from easyllm.engine.request import Logprobs, Request, TokenEvent
from easyllm.serve.errors import error_body
from easyllm.serve.form import refused
from easyllm.serve.generate import encode_text
from easyllm.serve.json_text import JSONResponse
from easyllm.serve.merged import merged
from easyllm.serve.models import ServedModel
from easyllm.serve.openai.chat_answers import usage
from easyllm.serve.openai.completion_request import CompletionRequest
from easyllm.serve.openai.logprobs import MIN_LOGPROB
from easyllm.serve.output import Counts
from easyllm.serve.service import EngineFailure
from easyllm.serve.sse import DONE, sse
from easyllm.serve.trace import RequestTrace
from easyllm.tokenizer.token_bytes import shown
from easyllm.tokenizer.tokenizer import Tokenizer

Batches = AsyncIterator[tuple[int, list[TokenEvent]]]


@dataclass(slots=True)
class Completions:
    """Running completions of one request.

    Attributes:
        request: the request.
        served: the model.
        prompts: token ids of each prompt.
        texts: text of each prompt.
        batches: the events, with the number of their prompt.
        counts: numbers of tokens so far.
    """

    request: CompletionRequest
    served: ServedModel
    prompts: list[list[int]]
    texts: list[str]
    batches: Batches
    counts: Counts = field(default_factory=Counts)
    choices: dict[int, "_Choice"] = field(default_factory=dict)

    def choice(self, prompt: int, event: TokenEvent) -> "_Choice":
        """Returns the choice to which an event belongs, and counts the event's token."""
        index = prompt * (self.request.n or 1) + event.index
        if index not in self.choices:
            self.choices[index] = _Choice(index, prompt, self)
        self.counts.completion += event.token_id is not None
        if event.index == 0:
            self.counts.cached += event.cached_tokens
        if event.finish_reason == "cancelled":
            raise EngineFailure("the request was cancelled; see the server's log")
        return self.choices[index]


@dataclass(slots=True)
class _Choice:
    """One completion while its events arrive."""

    index: int
    prompt: int
    of: Completions
    length: int = 0  # characters of the text so far
    begun: bool = False

    def take(self, event: TokenEvent) -> tuple[str, JsonObject | None]:
        """Returns the text that an event adds, and its log-probabilities if requested."""
        request, tokenizer = self.of.request, self.of.served.llm.tokenizer
        text, places = "", list[Logprobs | int]()
        offsets = list[int]()
        if request.echo and not self.begun:
            text = self.of.texts[self.prompt]
            ids = self.of.prompts[self.prompt]
            places += [ids[0], *(event.prompt_logprobs or ())]
            offsets += _offsets(ids, tokenizer)
        self.begun = True
        if request.max_tokens != 0:
            if event.logprobs is not None:
                offsets.append(self.length + len(text))
                places.append(event.logprobs)
            text += event.text
        self.length += len(text)
        if request.logprobs is None:
            return text, None
        return text, _legacy(places, offsets, tokenizer)


async def start(
    request: CompletionRequest, served: ServedModel, trace: RequestTrace | None
) -> Completions:
    """Starts the completions; returns once their first events are there.

    Raises:
        EasyllmError: the engine rejects a prompt or the guide.
        EngineFailure: an engine step failed, or the server is shutting down.
    """
    llm = served.llm

    def prepared() -> tuple[list[list[int]], list[str], list[Request]]:
        ids = [_ids(each, request, llm) for each in request.prompt]
        given = [each for each in request.prompt if isinstance(each, str)]
        texts = given or ([llm.tokenizer.decode(each) for each in ids] if request.echo else [])
        guide, field = request.guide()
        with refused(field):
            mask = None if guide is None else llm.guides.compile(guide)
        params = request.sampling(served.defaults)
        if guide is not None:
            check_guided_params(params)
        return (
            ids,
            texts,
            [
                Request(
                    prompt_ids=tuple(each),
                    params=params,
                    adapter=served.adapter,
                    salt=request.cache_salt or "",
                    mask=mask,
                )
                for each in ids
            ],
        )

    prompts, texts, requests = await asyncio.to_thread(prepared)
    streams = merged([served.service.batches(each, trace) for each in requests])
    first = await anext(streams)

    async def batches() -> Batches:
        yield first
        async for each in streams:
            yield each

    counts = Counts(prompt=sum(map(len, prompts)))
    return Completions(request, served, prompts, texts, batches(), counts)


def _ids(prompt: str | list[int], request: CompletionRequest, llm: LLM) -> list[int]:
    if isinstance(prompt, str):
        return encode_text(prompt, llm, special_tokens=request.add_special_tokens is not False)
    return prompt


def _head(request: CompletionRequest) -> JsonObject:
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": request.model,
    }


async def whole(running: Completions) -> Response:
    """Returns all choices in one response, with their usage."""
    texts: dict[int, list[str]] = {}
    parts: dict[int, list[JsonObject]] = {}
    reasons: dict[int, str] = {}
    async for prompt, events in running.batches:
        for event in events:
            choice = running.choice(prompt, event)
            text, logprobs = choice.take(event)
            texts.setdefault(choice.index, []).append(text)
            if logprobs is not None:
                parts.setdefault(choice.index, []).append(logprobs)
            if event.finish_reason is not None:
                reasons[choice.index] = event.finish_reason
    choices = [
        {
            "index": index,
            "text": "".join(texts[index]),
            "logprobs": _joined(parts[index]) if index in parts else None,
            "finish_reason": _reason(running.request, reasons[index]),
        }
        for index in sorted(texts)
    ]
    counts = _shown(running)
    return JSONResponse({**_head(running.request), "choices": choices, "usage": counts})


async def stream(running: Completions) -> AsyncIterator[str]:
    """Yields server-sent events; if usage is requested, it is null until the final chunk."""
    request, head = running.request, _head(running.request)

    def chunk(choices: list[JsonObject], *, with_usage: bool) -> str:
        value = {**head, "choices": choices}
        if request.wants_usage:
            value["usage"] = _shown(running) if with_usage else None
        return sse(value)

    def chunks(prompt: int, events: list[TokenEvent]) -> str:
        pieces = list[str]()
        for event in events:
            choice = running.choice(prompt, event)
            text, logprobs = choice.take(event)
            reason = event.finish_reason
            if text or logprobs is not None or reason is not None:
                value = {
                    "index": choice.index,
                    "text": text,
                    "logprobs": logprobs,
                    "finish_reason": None if reason is None else _reason(request, reason),
                }
                pieces.append(chunk([value], with_usage=request.wants_running_usage))
        return "".join(pieces)

    try:
        async for prompt, events in running.batches:
            if text := chunks(prompt, events):
                yield text
    except EngineFailure as error:
        yield sse(error_body(error.status, str(error)))
        return
    if request.wants_usage:
        yield chunk([], with_usage=True)
    yield DONE


def _reason(request: CompletionRequest, reason: str) -> str:
    return "length" if request.max_tokens == 0 else reason


def _shown(running: Completions) -> JsonObject:
    """Returns the usage; a token generated only to read the prompt does not count."""
    if running.request.max_tokens == 0:
        running.counts.completion = 0
    return usage(running.counts).model_dump()


def _offsets(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Returns the character at which each token of a prompt begins."""
    offsets, own = list[int](), b""
    for token_id in ids:
        offsets.append(len(own.decode("utf-8", "ignore")))
        if token_id not in tokenizer.special_ids:
            own += tokenizer.token_bytes(token_id) or b""
    return offsets


def _legacy(
    places: Sequence[Logprobs | int], offsets: list[int], tokenizer: Tokenizer
) -> JsonObject:
    """Returns log-probabilities in the format of completions: lists with an entry per token.

    Args:
        places: the tokens; an id is the first token of a text, which has no log-probability.
        offsets: the character of the text at which each token begins.
        tokenizer: the tokenizer of the model.
    """
    tokens, values, tops = list[str](), list[float | None](), list[dict[str, float] | None]()
    for place in places:
        if isinstance(place, int):
            tokens.append(_name(place, tokenizer))
            values.append(None)
            tops.append(None)
            continue
        name = _name(place.token_id, tokenizer)
        tokens.append(name)
        values.append(max(place.raw, MIN_LOGPROB))
        # the token itself last: of two tokens with the same text, the likelier one is kept
        top: dict[str, float] = {}
        for token_id, value in chain(place.top_raw, [(place.token_id, place.raw)]):
            other = _name(token_id, tokenizer)
            top[other] = max(value, MIN_LOGPROB, top.get(other, MIN_LOGPROB))
        tops.append(top)
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _name(token_id: int, tokenizer: Tokenizer) -> str:
    return shown(tokenizer.token_bytes(token_id) or b"")


def _joined(parts: Sequence[JsonObject]) -> JsonObject:
    return {name: list(chain.from_iterable(part[name] for part in parts)) for name in parts[0]}
