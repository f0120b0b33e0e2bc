"""Response bodies of the server, in OpenAI's schema."""

from typing import Literal

from pydantic import BaseModel, Field


class ModelEntry(BaseModel):
    """A served model.

    `max_model_len` (vLLM's name) is the maximum number of tokens of a prompt plus its completion.
    """

    id: str = Field(description="Name under which the model is served.")
    object: Literal["model"] = Field("model", description="Type of the object.")
    created: int = Field(description="Time at which the server started, in seconds since 1970.")
    owned_by: str = Field("easyllm", description="Owner of the model.")
    max_model_len: int = Field(
        description="Maximum number of tokens of a prompt plus its completion (vLLM's name)."
    )


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"] = Field("list", description="Type of the object.")
    data: list[ModelEntry] = Field(description="The models.")


class Health(BaseModel):
    """The body of a successful health check."""

    status: Literal["ok"] = Field("ok", description="Always ok.")


class TopLogprob(BaseModel):
    """A candidate token at one position of a completion, with its log-probability."""

    token: str = Field(description="Text of the token.")
    bytes: list[int] | None = Field(description="UTF-8 bytes of the token.")
    logprob: float = Field(description="Log-probability of the token in nats.")


class TokenLogprob(TopLogprob):
    """A generated token: its own text and bytes, and its log-probability in nats."""

    top_logprobs: list[TopLogprob] = Field(
        description="The most likely tokens at this position, most likely first."
    )


class ChoiceLogprobs(BaseModel):
    """Log-probabilities of the tokens in a completion's content."""

    content: list[TokenLogprob] = Field(description="Log-probabilities of each token.")
    refusal: None = Field(None, description="Always null.")


class AssistantMessage(BaseModel):
    """The generated message of a choice."""

    role: Literal["assistant"] = Field("assistant", description="Role of the message.")
    content: str = Field(description="The generated text.")
    refusal: None = Field(None, description="Always null.")


class Choice(BaseModel):
    """One of the completions of a request."""

    index: int = Field(description="Number of the completion, from 0.")
    message: AssistantMessage = Field(description="The generated message.")
    logprobs: ChoiceLogprobs | None = Field(description="Log-probabilities, if requested.")
    finish_reason: str | None = Field(
        description="Why generation ended: stop (EOS or a stop string) or length (the token limit)."
    )


class Usage(BaseModel):
    """Token counts of a prompt and of all its completions."""

    prompt_tokens: int = Field(description="Number of tokens of the prompt.")
    completion_tokens: int = Field(description="Number of generated tokens.")
    total_tokens: int = Field(description="Sum of the two.")


class ChatCompletion(BaseModel):
    """The response to a non-streaming chat request."""

    id: str = Field(description="Id of the completion.")
    object: Literal["chat.completion"] = Field("chat.completion", description="Type of the object.")
    created: int = Field(description="Time of the request, in seconds since 1970.")
    model: str = Field(description="Name of the model.")
    service_tier: Literal["default"] | None = Field(
        None, description="Present if the request has one."
    )
    choices: list[Choice] = Field(description="The completions.")
    usage: Usage = Field(description="Token counts.")


def usage(prompt: int, completion: int) -> Usage:
    """Returns the usage for `prompt` prompt tokens and `completion` generated tokens."""
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )
