"""Response bodies of the server, in OpenAI's schema."""

from typing import Literal

from pydantic import BaseModel


class ModelEntry(BaseModel):
    """A served model.

    `max_model_len` (vLLM's name) is the maximum number of tokens of a prompt plus its completion.
    """

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
    """The body of a successful health check."""

    status: Literal["ok"] = "ok"


class TopLogprob(BaseModel):
    """A candidate token at one position of a completion, with its log-probability."""

    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TopLogprob):
    """A generated token: its own text and bytes, and its log-probability in nats."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Log-probabilities of the tokens in a completion's content."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    """The generated message of a choice."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """One of the completions of a request."""

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str | None


class Usage(BaseModel):
    """Token counts of a prompt and of all its completions."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    """The response to a non-streaming chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    service_tier: Literal["default"] | None = None
    choices: list[Choice]
    usage: Usage


def usage(prompt: int, completion: int) -> Usage:
    """Returns the usage for `prompt` prompt tokens and `completion` generated tokens."""
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )
