"""Bodies of successful responses, for `/openapi.json`.

The server writes them piece by piece and as plain objects, so these models only describe them; a
test validates real responses against them. They are imported when the routes are described.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from easyllm.serve.openai.chat_answers import ChatCompletion, Usage
from easyllm.serve.responses.answer_schemas import ResponseBody


class Answer(BaseModel):
    """A body, or a part of one, without further fields."""

    model_config = ConfigDict(extra="forbid")


class CompletionLogprobs(Answer):
    """Log-probabilities of a completion: lists with an entry for each token."""

    tokens: list[str] = Field(description="Text of each token.")
    token_logprobs: list[float | None] = Field(
        description="Log-probability of each token in nats; null for the first token of a text."
    )
    top_logprobs: list[dict[str, float] | None] = Field(
        description="The most likely tokens at each position, with their log-probabilities."
    )
    text_offset: list[int] = Field(description="Character of the text at which each token begins.")


class CompletionChoice(Answer):
    """One of the completions of a prompt."""

    index: int = Field(description="Number of the completion, from 0; prompt by prompt.")
    text: str = Field(description="The generated text; with `echo`, after the prompt.")
    logprobs: CompletionLogprobs | None = Field(description="Log-probabilities, if requested.")
    finish_reason: Literal["stop", "length"] = Field(
        description="Why generation ended: stop (EOS or a stop string) or length."
    )


class Completion(Answer):
    """The response to a request for completions."""

    id: str = Field(description="Id of the completions.")
    object: Literal["text_completion"] = Field(description="Type of the object.")
    created: int = Field(description="Time of the request, in seconds since 1970.")
    model: str = Field(description="Name of the model.")
    choices: list[CompletionChoice] = Field(description="The completions.")
    usage: Usage = Field(description="Token counts.")


class Embedding(Answer):
    """The embedding of one text."""

    object: Literal["embedding"] = Field(description="Type of the object.")
    index: int = Field(description="Number of the text, from 0.")
    embedding: list[float] | str = Field(
        description="The vector, or the base64 of its little-endian fp32 bytes."
    )


class EmbeddingUsage(Answer):
    """Token counts of a request for embeddings."""

    prompt_tokens: int = Field(description="Number of tokens of all texts.")
    total_tokens: int = Field(description="The same.")


class Embeddings(Answer):
    """The response to a request for embeddings."""

    object: Literal["list"] = Field(description="Type of the object.")
    data: list[Embedding] = Field(description="The embeddings, in the order of the texts.")
    model: str = Field(description="Name of the model.")
    usage: EmbeddingUsage = Field(description="Token counts.")


class TextBlock(Answer):
    """Text of an answer in Anthropic's format."""

    type: Literal["text"] = Field(description="Type of the block.")
    text: str = Field(description="The text.")


class ThinkingBlock(Answer):
    """Reasoning before an answer in Anthropic's format."""

    type: Literal["thinking"] = Field(description="Type of the block.")
    thinking: str = Field(description="The reasoning.")
    signature: str = Field(description="Always none; nothing is signed.")


class ToolUseBlock(Answer):
    """A tool call in Anthropic's format."""

    type: Literal["tool_use"] = Field(description="Type of the block.")
    id: str = Field(description="Id of the call, to which its result refers.")
    name: str = Field(description="Name of the tool.")
    input: dict[str, Any] = Field(description="The arguments; empty if the token limit cut them.")


class MessageUsage(Answer):
    """Token counts in Anthropic's format."""

    input_tokens: int = Field(description="Tokens of the prompt that were not cached.")
    cache_creation_input_tokens: int = Field(description="Always 0.")
    cache_read_input_tokens: int = Field(description="Tokens of the prompt that were cached.")
    output_tokens: int = Field(description="Number of generated tokens.")


class Message(Answer):
    """The response of Anthropic's Messages API."""

    id: str = Field(description="Id of the message.")
    type: Literal["message"] = Field(description="Type of the object.")
    role: Literal["assistant"] = Field(description="Role of the message.")
    model: str = Field(description="Name of the model.")
    content: list[TextBlock | ThinkingBlock | ToolUseBlock] = Field(description="The answer.")
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] = Field(
        description="Why generation ended."
    )
    stop_sequence: str | None = Field(description="The stop string that ended the message.")
    usage: MessageUsage = Field(description="Token counts.")


class TokenCount(Answer):
    """The number of tokens of a conversation."""

    input_tokens: int = Field(description="Number of tokens.")


class Tokens(Answer):
    """The token ids of a text or of a conversation."""

    count: int = Field(description="Number of tokens.")
    max_model_len: int = Field(
        description="Maximum number of tokens of a prompt plus its completion."
    )
    tokens: list[int] = Field(description="The token ids.")
    token_strs: list[str] | None = Field(description="Text of each token, if requested.")


class Prompt(Answer):
    """The text of token ids."""

    prompt: str = Field(description="The text, with the names of special tokens.")


class RenderedPrompt(Prompt):
    """The text of a conversation."""

    count: int = Field(description="Number of tokens.")


class TokenizerInfo(Answer):
    """The special tokens and the chat template of a model."""

    tokenizer_class: str = Field(description="Class of the tokenizer.")
    model: str = Field(description="Name of the model.")
    vocab_size: int = Field(description="Number of token ids.")
    model_max_length: int = Field(
        description="Maximum number of tokens of a prompt plus its completion."
    )
    bos_token: str | None = Field(description="Token with which texts begin.")
    eos_token: str | None = Field(description="Token with which texts end.")
    pad_token: str | None = Field(description="Token that fills up batches.")
    unk_token: str | None = Field(description="Token of what the vocabulary does not contain.")
    chat_template: str | None = Field(description="The chat template, in Jinja.")


class Loaded(Answer):
    """The model or adapter that was loaded."""

    loaded: str = Field(description="Its name.")


class Unloaded(Answer):
    """The model or adapter that was unloaded."""

    unloaded: str = Field(description="Its name.")


class DeletedResponse(Answer):
    """The response that was deleted."""

    id: str = Field(description="Id of the response.")
    object: Literal["response"] = Field(description="Type of the object.")
    deleted: Literal[True] = Field(description="Always true.")


class InputItems(Answer):
    """The conversation that led to a response."""

    object: Literal["list"] = Field(description="Type of the object.")
    data: list[dict[str, Any]] = Field(description="The items.")
    has_more: Literal[False] = Field(description="Always false; all items are sent.")
    first_id: str | None = Field(description="Id of the first item, if it has one.")
    last_id: str | None = Field(description="Id of the last item, if it has one.")


_RESPONSE = "/v1/responses/{response_id}"
ANSWERS: Mapping[tuple[str, str], type[BaseModel]] = {
    ("post", "/v1/chat/completions"): ChatCompletion,
    ("post", "/v1/completions"): Completion,
    ("post", "/v1/embeddings"): Embeddings,
    ("post", "/v1/responses"): ResponseBody,
    ("get", _RESPONSE): ResponseBody,
    ("delete", _RESPONSE): DeletedResponse,
    ("get", f"{_RESPONSE}/input_items"): InputItems,
    ("post", "/v1/messages"): Message,
    ("post", "/v1/messages/count_tokens"): TokenCount,
    ("post", "/v1/load_lora_adapter"): Loaded,
    ("post", "/v1/unload_lora_adapter"): Unloaded,
    ("post", "/models/load"): Loaded,
    ("post", "/models/unload"): Unloaded,
    ("post", "/tokenize"): Tokens,
    ("post", "/detokenize"): Prompt,
    ("post", "/apply-template"): RenderedPrompt,
    ("get", "/tokenizer_info"): TokenizerInfo,
}
"""The body of a successful response, by method and path."""
