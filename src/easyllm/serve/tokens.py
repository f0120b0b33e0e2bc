"""Routes about tokens, under vLLM's names: tokenize, detokenize, apply a chat template."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.config import JsonDict

from easyllm.core.json_types import JsonObject
from easyllm.serve.errors import APIError
from easyllm.serve.generate import encode
from easyllm.serve.job import Conversation, Reasoning
from easyllm.serve.models import ServedModel
from easyllm.serve.openai.chat_request import MAX_MESSAGES
from easyllm.serve.openai.messages import ChatMessage, template_messages
from easyllm.serve.openai.sampling_fields import WholeCount
from easyllm.serve.openai.tools import MAX_TOOLS, Tool, template_tools
from easyllm.serve.treatment import Strict

MAX_TOKENS = 2**20


class _OfAConversation(Strict):
    """Fields that say how a conversation is rendered."""

    model: str | None = Field(None, description="Name of a served model; by default the first.")
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = (
        Field(None, description="A conversation, which the chat template renders.")
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Whether the header of an assistant turn follows. By default true."
    )
    continue_final_message: bool | None = Field(
        None, description="Whether the last message is continued. By default false."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the chat template."
    )

    def rendered(self, served: ServedModel) -> tuple[tuple[int, ...], str]:
        """Returns the token ids and the text of the conversation.

        Raises:
            DataError: the chat template rejects it.
        """
        assert self.messages is not None, "checked by the routes"
        continued = bool(self.continue_final_message)
        talk = Conversation(
            messages=template_messages(self.messages),
            tools=template_tools(self.tools),
            variables=self.chat_template_kwargs or {},
            add_generation_prompt=not continued and self.add_generation_prompt is not False,
            continue_final_message=continued,
        )
        return encode(talk, Reasoning(), served.llm)


class ApplyTemplateRequest(_OfAConversation):
    """A request for the text of a conversation."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="The conversation, which the chat template renders."
    )


_TEXT_OR_CONVERSATION: JsonDict = {
    "oneOf": [
        {"properties": {"prompt": {"type": "string"}}, "required": ["prompt"]},
        {"properties": {"messages": {"type": "array"}}, "required": ["messages"]},
    ]
}


class TokenizeRequest(_OfAConversation):
    """A request for the token ids of a text or of a conversation."""

    model_config = ConfigDict(json_schema_extra=_TEXT_OR_CONVERSATION)

    prompt: str | None = Field(
        None,
        description="A text; the names of special tokens in it are encoded as these tokens.",
    )
    add_special_tokens: bool | None = Field(
        None, description="Whether BOS and the like are added to a text. By default true."
    )
    return_token_strs: bool | None = Field(
        None, description="Whether the text of each token is returned too."
    )


class DetokenizeRequest(Strict):
    """A request for the text of token ids."""

    model: str | None = Field(None, description="Name of a served model; by default the first.")
    tokens: Annotated[list[WholeCount], Field(max_length=MAX_TOKENS)] = Field(
        description="The token ids."
    )


def tokenize(request: TokenizeRequest, served: ServedModel) -> JsonObject:
    """Returns the token ids of a text or of a conversation.

    Raises:
        APIError: there is neither, or both.
        DataError: the chat template rejects the conversation.
    """
    if (request.prompt is None) == (request.messages is None):
        message = "send a prompt or messages, and not both"
        raise APIError(400, message, param="prompt", code="invalid_value")
    tokenizer = served.llm.tokenizer
    if request.prompt is None:
        ids = list(request.rendered(served)[0])
    else:
        special = request.add_special_tokens is not False
        ids = tokenizer.encode(request.prompt, special_tokens=special)
    found: JsonObject = {
        "count": len(ids),
        "max_model_len": served.max_tokens,
        "tokens": ids,
        "token_strs": None,
    }
    if request.return_token_strs:
        found["token_strs"] = [tokenizer.decode([each], skip_special=False) for each in ids]
    return found


def detokenize(request: DetokenizeRequest, served: ServedModel) -> JsonObject:
    """Returns the text of token ids, with the names of special tokens.

    Raises:
        ConfigError: an id is outside the vocabulary.
    """
    if request.tokens:
        served.llm.engine.check_tokens(request.tokens)
    return {"prompt": served.llm.tokenizer.decode(request.tokens, skip_special=False)}


def tokenizer_info(served: ServedModel) -> JsonObject:
    """Returns what evaluation tools ask of a tokenizer: its special tokens, its chat template."""
    tokenizer = served.llm.tokenizer
    special = tokenizer.special
    template = tokenizer.chat_template
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "model": served.name,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": served.max_tokens,
        "bos_token": special.bos,
        "eos_token": special.eos,
        "pad_token": special.pad,
        "unk_token": special.unk,
        "chat_template": None if template is None else template.source,
    }
