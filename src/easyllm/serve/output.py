"""What a job generates, in the one form that all dialects of the API are written from."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from easyllm.serve.content_tokens import ContentToken

EndReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text of an answer.

    Attributes:
        index: index of the choice.
        text: the text.
        tokens: its tokens, if log-probabilities are requested.
    """

    index: int
    text: str
    tokens: tuple[ContentToken, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Text of the reasoning before an answer."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """The beginning of a tool call.

    Attributes:
        index: index of the choice.
        call: number of the call within the choice, from 0.
        id: id of the call, unique.
        name: name of the tool.
    """

    index: int
    call: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A part of the arguments of a tool call, which together are JSON text."""

    index: int
    call: int
    text: str


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """The end of a choice.

    Attributes:
        index: index of the choice.
        reason: why it ended; `tool_calls` if it contains any and ended by itself.
        stop: the stop string or token id of the request that ended it.
    """

    index: int
    reason: EndReason
    stop: str | int | None = None


OutputEvent: TypeAlias = TextDelta | ReasoningDelta | CallBegin | CallDelta | ChoiceEnd


@dataclass(slots=True)
class Counts:
    """Numbers of tokens of a job so far.

    Attributes:
        prompt: tokens of the prompt.
        cached: those of them whose keys and values came from the prefix cache.
        completion: generated tokens of all choices.
        reasoning: those of them that were generated before the reasoning ended.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0


@dataclass(slots=True)
class Generated:
    """A running job.

    Attributes:
        counts: numbers of tokens, updated as events arrive.
        events: the events, in lists of those that are ready at once.
    """

    counts: Counts
    events: AsyncIterator[list[OutputEvent]]
