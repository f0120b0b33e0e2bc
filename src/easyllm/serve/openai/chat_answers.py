"""Response bodies of the server, in OpenAI's schema."""

from typing import Literal

from pydantic import BaseModel, Field

from easyllm.serve.openai.logprobs import ChoiceLogprobs
from easyllm.serve.output import Counts


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
    default_sampling: dict[str, float] = Field(
        {}, description="Sampling parameters that the model recommends, which are the defaults."
    )
    step: int | None = Field(
        None, description="Step of the checkpoint, if it is the newest of a training run."
    )
    scores: dict[str, float] = Field(
        {}, description="Evaluation metrics of the training run at that step."
    )


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"] = Field("list", description="Type of the object.")
    data: list[ModelEntry] = Field(description="The models.")


class Health(BaseModel):
    """The body of a successful health check."""

    status: Literal["ok"] = Field("ok", description="Always ok.")


class CalledFunctionAnswer(BaseModel):
    """The function of a generated tool call."""

    name: str = Field(description="Name of the function.")
    arguments: str = Field(description="Its arguments, as JSON text.")


class ToolCallAnswer(BaseModel):
    """A generated tool call."""

    id: str = Field(description="Id of the call, to which its result refers.")
    type: Literal["function"] = Field("function", description="Type of the call.")
    function: CalledFunctionAnswer = Field(description="The function and its arguments.")


class AssistantMessage(BaseModel):
    """The generated message of a choice."""

    role: Literal["assistant"] = Field("assistant", description="Role of the message.")
    content: str | None = Field(
        description="The generated text; null if the message consists of tool calls."
    )
    refusal: None = Field(None, description="Always null.")
    reasoning_content: str | None = Field(
        None, description="The reasoning before the answer, present if there is any."
    )
    tool_calls: list[ToolCallAnswer] | None = Field(
        None, description="The tool calls, present if there are any."
    )


class Choice(BaseModel):
    """One of the completions of a request."""

    index: int = Field(description="Number of the completion, from 0.")
    message: AssistantMessage = Field(description="The generated message.")
    logprobs: ChoiceLogprobs | None = Field(description="Log-probabilities, if requested.")
    finish_reason: str | None = Field(
        description="Why generation ended: stop (EOS or a stop string), length (the token limit) "
        "or tool_calls."
    )


class PromptDetails(BaseModel):
    """Details of the prompt's tokens."""

    cached_tokens: int = Field(
        description="Tokens whose keys and values came from the prefix cache."
    )


class CompletionDetails(BaseModel):
    """Details of the generated tokens."""

    reasoning_tokens: int = Field(description="Tokens generated before the reasoning ended.")


class Usage(BaseModel):
    """Token counts of a prompt and of all its completions."""

    prompt_tokens: int = Field(description="Number of tokens of the prompt.")
    completion_tokens: int = Field(description="Number of generated tokens.")
    total_tokens: int = Field(description="Sum of the two.")
    prompt_tokens_details: PromptDetails = Field(
        description="How many of the prompt's tokens were cached."
    )
    completion_tokens_details: CompletionDetails = Field(
        description="How many of the generated tokens were reasoning."
    )


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


def usage(counts: Counts) -> Usage:
    """Returns the usage in OpenAI's format."""
    return Usage(
        prompt_tokens=counts.prompt,
        completion_tokens=counts.completion,
        total_tokens=counts.prompt + counts.completion,
        prompt_tokens_details=PromptDetails(cached_tokens=counts.cached),
        completion_tokens_details=CompletionDetails(reasoning_tokens=counts.reasoning),
    )
