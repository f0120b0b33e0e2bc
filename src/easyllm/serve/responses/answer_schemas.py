"""The body of a response of the Responses API, for `/openapi.json`; `answers` writes it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from easyllm.serve.openai.logprobs import TokenLogprob

Status = Literal["completed", "incomplete", "in_progress"]


class ResponsePart(BaseModel):
    """An object without further fields."""

    model_config = ConfigDict(extra="forbid")


class OutputText(ResponsePart):
    """Text of an answer."""

    type: Literal["output_text"] = Field(description="Type of the part.")
    text: str = Field(description="The text.")
    annotations: list[Any] = Field(max_length=0, description="Always empty.")
    logprobs: list[TokenLogprob] = Field(
        description="Log-probabilities of its tokens, if requested."
    )


class OutputMessage(ResponsePart):
    """The answer."""

    id: str = Field(description="Id of the item.")
    type: Literal["message"] = Field(description="Type of the item.")
    status: Status = Field(description="incomplete if the token limit cut it.")
    role: Literal["assistant"] = Field(description="Role of the message.")
    content: list[OutputText] = Field(description="Its text.")


class ReasoningText(ResponsePart):
    """Text of the reasoning."""

    type: Literal["reasoning_text"] = Field(description="Type of the part.")
    text: str = Field(description="The text.")


class OutputReasoning(ResponsePart):
    """The reasoning before an answer."""

    id: str = Field(description="Id of the item.")
    type: Literal["reasoning"] = Field(description="Type of the item.")
    status: Status = Field(description="incomplete if the token limit cut it.")
    summary: list[Any] = Field(max_length=0, description="Always empty.")
    encrypted_content: None = Field(description="Always null.")
    content: list[ReasoningText] = Field(description="Its text.")


class OutputCall(ResponsePart):
    """A tool call."""

    id: str = Field(description="Id of the item.")
    type: Literal["function_call"] = Field(description="Type of the item.")
    status: Status = Field(description="incomplete if the token limit cut it.")
    call_id: str = Field(description="Id of the call, to which its result refers.")
    name: str = Field(description="Name of the function.")
    arguments: str = Field(description="Its arguments, as JSON text.")


class InputDetails(ResponsePart):
    """Details of the prompt's tokens."""

    cached_tokens: int = Field(description="Tokens that came from the prefix cache.")
    cache_write_tokens: int = Field(description="Always 0.")


class OutputDetails(ResponsePart):
    """Details of the generated tokens."""

    reasoning_tokens: int = Field(description="Tokens generated before the reasoning ended.")


class ResponseUsage(ResponsePart):
    """Token counts of a response."""

    input_tokens: int = Field(description="Number of tokens of the prompt.")
    input_tokens_details: InputDetails = Field(description="How many of them were cached.")
    output_tokens: int = Field(description="Number of generated tokens.")
    output_tokens_details: OutputDetails = Field(description="How many of them were reasoning.")
    total_tokens: int = Field(description="Sum of the two.")


class IncompleteDetails(ResponsePart):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"] = Field(description="The token limit cut it.")


class ResponseBody(ResponsePart):
    """A response."""

    id: str = Field(description="Id of the response.")
    object: Literal["response"] = Field(description="Type of the object.")
    created_at: int = Field(description="Time of the request, in seconds since 1970.")
    completed_at: int | None = Field(description="Time of its end; null if it is incomplete.")
    status: Literal["completed", "incomplete"] = Field(
        description="incomplete if the token limit cut it."
    )
    background: Literal[False] = Field(description="Always false.")
    error: None = Field(description="Always null; a failed request gets an error response.")
    incomplete_details: IncompleteDetails | None = Field(description="Why it is incomplete.")
    instructions: str | None = Field(description="System prompt of the request.")
    max_output_tokens: int | None = Field(description="Maximum number of tokens to generate.")
    max_tool_calls: int | None = Field(description="As in the request.")
    model: str = Field(description="Name of the model.")
    output: list[OutputMessage | OutputReasoning | OutputCall] = Field(
        description="Reasoning, text and tool calls, in the order of their generation."
    )
    parallel_tool_calls: bool = Field(description="Whether several tools may be called at once.")
    previous_response_id: str | None = Field(description="The response that this one continues.")
    reasoning: dict[str, Any] = Field(description="Its effort.")
    service_tier: Literal["default"] = Field(description="There is only one tier.")
    store: bool = Field(description="Whether the response is kept, to be continued.")
    temperature: float = Field(description="The temperature that applied.")
    text: dict[str, Any] = Field(description="The form of the text.")
    tool_choice: str | dict[str, Any] = Field(description="Which tools may or must be called.")
    tools: list[dict[str, Any]] = Field(description="Functions that the model may call.")
    top_logprobs: int = Field(description="Number of most likely tokens at each position.")
    top_p: float = Field(description="The top-p that applied.")
    truncation: Literal["disabled"] = Field(description="The conversation is never shortened.")
    usage: ResponseUsage = Field(description="Token counts.")
    user: str | None = Field(description="As in the request.")
    metadata: dict[str, str] = Field(description="As in the request.")
