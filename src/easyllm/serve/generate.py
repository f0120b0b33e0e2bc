"""Runs a job on an engine and translates its tokens to the output that dialects write."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field

from easyllm.engine.guide_spec import check_guided_params
from easyllm.engine.llm import LLM
from easyllm.engine.prompts import with_system
from easyllm.engine.request import MaskSource, Request, TokenEvent
from easyllm.serve.content_tokens import ContentToken, ContentTokens
from easyllm.serve.form import Form, refused
from easyllm.serve.job import Conversation, Job, Reasoning
from easyllm.serve.models import ServedModel
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
from easyllm.serve.service import AdapterUnloaded, EngineFailure
from easyllm.serve.trace import RequestTrace
from easyllm.tokenizer.chat import refuse_long
from easyllm.tokenizer.tool_calls import (
    CallArguments,
    CallEnd,
    CallStart,
    OutputParser,
    Piece,
    ReasoningPiece,
    TextPiece,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A job ready for the engine.

    Attributes:
        ids: token ids of the prompt.
        mask: restricts the tokens of its completions.
        parses: whether completions are searched for reasoning or tool calls.
        starts_in_reasoning: whether the prompt ends inside the reasoning.
    """

    ids: tuple[int, ...]
    mask: MaskSource | None = None
    parses: bool = False
    starts_in_reasoning: bool = False


async def generate(job: Job, served: ServedModel, trace: RequestTrace | None = None) -> Generated:
    """Starts a job; returns once its first events are there, so that errors are raised here.

    Args:
        job: the job.
        served: the model that runs it.
        trace: receives the numbers of the request.

    Raises:
        EasyllmError: the chat template, the guide or the engine rejects the job.
        EngineFailure: an engine step failed, or the server is shutting down.
    """
    # Encoding a long conversation takes seconds; a thread keeps other clients' tokens flowing.
    prepared = await asyncio.to_thread(prepare, job, served.llm)
    params = job.params
    if prepared.parses:
        params = params.model_copy(update={"skip_special_tokens": False})
    request = Request(
        prompt_ids=prepared.ids,
        params=params,
        adapter=served.adapter,
        salt=job.salt,
        mask=prepared.mask,
    )
    counts = Counts(prompt=len(prepared.ids))
    batches = served.service.batches(request, trace)
    first = await anext(batches)
    reader = _Reader(job, prepared, served, counts)
    return Generated(counts, _events(reader, first, batches))


async def _events(
    reader: "_Reader", first: list[TokenEvent], rest: AsyncIterator[list[TokenEvent]]
) -> AsyncIterator[list[OutputEvent]]:
    """Yields the output of the engine's events; batches without any are passed over."""
    if found := reader.read(first):
        yield found
    async for batch in rest:
        if found := reader.read(batch):
            yield found


def prepare(job: Job, llm: LLM) -> _Prepared:
    """Encodes the prompt of a job and compiles its guide.

    Raises:
        EasyllmError: the chat template or the guide is rejected.
    """
    if job.guide is not None:
        check_guided_params(job.params)
    if not isinstance(job.prompt, Conversation):
        with refused(job.guide_field):
            mask = None if job.guide is None else llm.guides.compile(job.guide)
        return _Prepared(ids=job.prompt, mask=mask)
    talk, tokenizer = job.prompt, llm.tokenizer
    reasoning = tokenizer.reasoning
    ids, text = encode(talk, job.reasoning, llm)
    continued = talk.messages[-1]["content"] if talk.continue_final_message else ""
    starts = reasoning is not None and reasoning.is_open(text, continued)
    form = Form(job=job, tools=talk.tools, llm=llm, starts_in_reasoning=starts)
    return _Prepared(
        ids=ids,
        mask=form.mask(),
        parses=reasoning is not None or bool(talk.tools),
        starts_in_reasoning=starts,
    )


def encode(talk: Conversation, reasoning: Reasoning, llm: LLM) -> tuple[tuple[int, ...], str]:
    """Returns the token ids of a conversation and the text that they spell.

    Raises:
        DataError: the chat template rejects the conversation.
    """
    tokenizer, variables = llm.tokenizer, dict(talk.variables)
    if tokenizer.reasoning is not None and reasoning.on is not None:
        variables |= tokenizer.reasoning.template_kwargs(reasoning.on) or {}
    messages = with_system(talk.messages, llm.engine.options.system)
    messages, tools = tokenizer.tool_format.prepare(messages, talk.tools)
    encoded = tokenizer.encode_chat(
        messages,
        tools=tools or None,
        add_generation_prompt=talk.add_generation_prompt,
        continue_final_message=talk.continue_final_message,
        template_kwargs=variables,
        max_tokens=llm.engine.max_seq_len,
        reject_unrendered=True,
    )
    return tuple(encoded.token_ids), encoded.text


def encode_text(text: str, llm: LLM, *, special_tokens: bool = True) -> list[int]:
    """Returns the token ids of a plain text.

    Raises:
        ContextLengthError: it is certainly too long for the context, which is found out before it
            is encoded.
    """
    refuse_long(text, llm.tokenizer, llm.engine.max_seq_len, what="text")
    return llm.tokenizer.encode(text, special_tokens=special_tokens)


class _Reader:
    """Reads the engine's events of one job."""

    def __init__(self, job: Job, prepared: _Prepared, served: ServedModel, counts: Counts) -> None:
        self._job, self._prepared, self._counts = job, prepared, counts
        self._llm, self._adapter = served.llm, served.adapter
        self._choices: dict[int, _Choice] = {}

    def read(self, batch: Sequence[TokenEvent]) -> list[OutputEvent]:
        """Returns the output of a batch of events.

        Raises:
            EngineFailure: the engine cancelled the job, or its adapter was unloaded.
        """
        found: list[OutputEvent] = []
        for event in batch:
            if event.finish_reason == "cancelled":
                raise self._failure()
            choice = self._choices.get(event.index)
            if choice is None:
                choice = self._choices[event.index] = self._new_choice()
            self._counts.cached = max(self._counts.cached, event.cached_tokens)
            if event.token_id is not None:
                self._counts.completion += 1
                self._counts.reasoning += choice.reasoning
            found += choice.read(event)
        return found

    def _failure(self) -> EngineFailure:
        """Returns why the engine cancelled the job."""
        if self._adapter and self._adapter not in self._llm.engine.adapter_names:
            return AdapterUnloaded(
                f"the adapter {self._adapter!r} was unloaded while the request ran; load it again"
            )
        return EngineFailure("the request was cancelled; see the server's log")

    def _new_choice(self) -> "_Choice":
        tokenizer, prepared = self._llm.tokenizer, self._prepared
        tokens = None
        if self._job.params.logprobs is not None:
            ends = self._llm.model.config.eos_token_ids
            skips = self._job.params.skip_special_tokens and not prepared.parses
            tokens = ContentTokens(tokenizer, ends, skip_special=skips)
        if not prepared.parses:
            return _Choice(tokens=tokens)
        assert isinstance(self._job.prompt, Conversation), "only conversations are parsed"
        tools, skips = self._job.prompt.tools, self._job.params.skip_special_tokens
        calls = tools and self._job.tool_choice.mode != "none"
        parser = OutputParser(
            tokenizer.tool_format if calls else None,
            tokenizer.reasoning,
            starts_in_reasoning=prepared.starts_in_reasoning,
            tools=tools,
            special_names=tokenizer.special_names if skips else (),
        )
        return _Choice(
            tokens=tokens,
            parser=parser,
            reasoning=prepared.starts_in_reasoning,
            removed=tokenizer.special_ids if skips else frozenset(),
        )


@dataclass(slots=True)
class _Choice:
    """One completion of a job while its events arrive.

    Attributes:
        tokens: finds the tokens of the text, if log-probabilities are requested.
        parser: separates reasoning, text and tool calls; None if all is text.
        reasoning: whether the completion is inside its reasoning.
        calls: number of tool calls so far.
        cut: whether the last of them ended before its arguments did.
        unsent: tokens of text that the parser has not released yet.
        removed: ids of the tokens that the parser removes from texts.
    """

    tokens: ContentTokens | None = None
    parser: OutputParser | None = None
    reasoning: bool = False
    calls: int = 0
    cut: bool = False
    unsent: list[ContentToken] = field(default_factory=list)
    removed: Collection[int] = ()

    def read(self, event: TokenEvent) -> list[OutputEvent]:
        """Returns the output of an event."""
        text, released = event.text, list[ContentToken]()
        if self.tokens is not None:
            text, released = self.tokens.push(event)
        if self.parser is None:
            found: list[OutputEvent] = []
            if text:
                found.append(TextDelta(event.index, text, tuple(released)))
        else:
            self.unsent += [t for t in released if t.place.token_id not in self.removed]
            pieces = self.parser.push(text) if text else []
            if event.finish_reason is not None:
                pieces = [*pieces, *self.parser.finish()]
            found = [out for piece in pieces for out in self._output(event.index, piece)]
            if pieces and not isinstance(pieces[-1], TextPiece):
                self.unsent = []  # tokens of reasoning, of calls, and of marks
        if event.finish_reason is not None:
            # a stop string may end a call anywhere: clients would run incomplete arguments
            called = self.calls > 0 and not self.cut and event.finish_reason == "stop"
            reason = "tool_calls" if called else event.finish_reason
            found.append(ChoiceEnd(event.index, reason, event.stop))
        return found

    def _output(self, index: int, piece: Piece) -> list[OutputEvent]:
        """Returns the output of a piece."""
        self.reasoning = isinstance(piece, ReasoningPiece)
        match piece:
            case TextPiece(text=text):
                return [TextDelta(index, text, self._tokens_of(text))]
            case ReasoningPiece(text=text):
                return [ReasoningDelta(index, text)]
            case CallStart(index=call, name=name):
                self.calls += 1
                return [CallBegin(index, call, f"call_{uuid.uuid4().hex[:24]}", name)]
            case CallArguments(index=call, text=text):
                return [CallDelta(index, call, text)]
            case CallEnd(complete=complete):
                self.cut = not complete
                return []

    def _tokens_of(self, text: str) -> tuple[ContentToken, ...]:
        """Returns the unsent tokens that spell a text, at the last place where they do.

        Those before it, of a mark for example, are dropped; those after it stay unsent.
        """
        tokens, owns = self.unsent, [token.own or b"" for token in self.unsent]

        def spelled(begin: int, end: int) -> str:
            return b"".join(owns[begin:end]).decode("utf-8", "replace")

        begin, end = 0, len(tokens)
        if spelled(begin, end) != text:
            places = [at for at in range(end) if spelled(at, end).startswith(text)]
            places = places or [at for at in range(end) if text in spelled(at, end)]
            begin = places[-1] if places else 0
            end = next((to for to in range(begin, end) if text in spelled(begin, to)), end)
        self.unsent = tokens[end:]
        return tuple(tokens[begin:end])
