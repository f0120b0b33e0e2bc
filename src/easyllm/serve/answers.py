"""What the server answers, as OpenAI's schema has it."""

from typing import Literal

from pydantic import BaseModel


class ModelEntry(BaseModel):
    """A served model; `max_model_len` (vLLM's name) is the most tokens of a prompt with its answer."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "easyllm"
    max_model_len: int


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class Health(BaseModel):
    """That the server answers."""

    status: Literal["ok"] = "ok"


class TopLogprob(BaseModel):
    """A token that could have stood at a place."""

    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TopLogprob):
    """A token of the content: its own text and bytes, and its log-probability in nats."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """The tokens of an answer's content."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    """An answer's text."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """One of the answers to a request."""

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str | None


class Usage(BaseModel):
    """Tokens of a prompt and of all its answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    """The answer to a chat request that does not stream."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    service_tier: Literal["default"] | None = None
    choices: list[Choice]
    usage: Usage


def usage(prompt: int, completion: int) -> Usage:
    """Usage of a prompt of so many tokens and so many generated ones."""
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )
