"""Fields of `POST /v1/chat/completions`: every field of OpenAI's published schema.

Each is honoured, accepted at values that have no effect (`Neutral`), or rejected by name
(`Refused`).
"""

import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from easyllm.core.json_types import Json, JsonObject
from easyllm.engine.params import (
    MAX_COUNT,
    MAX_STOP_CHARS,
    MAX_STOPS,
    Count,
    SamplingParams,
    StopString,
)
from easyllm.serve.errors import APIError
from easyllm.serve.openai.messages import ChatMessage
from easyllm.serve.treatment import Neutral, Refused, Strict, as_api_error

MAX_NEW_TOKENS = 32_768
MAX_MESSAGES = 2_000
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20  # OpenAI's limit
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_STOP_SCHEMA: JsonDict = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_TOGETHER: JsonDict = {
    "allOf": [
        {
            "anyOf": [
                {"properties": {"max_tokens": {"type": "null"}}},
                {"properties": {"max_completion_tokens": {"type": "null"}}},
            ]
        },
        {
            "anyOf": [
                {"properties": {"stream_options": {"type": "null"}}},
                {"properties": {"stream": {"const": True}}, "required": ["stream"]},
            ]
        },
        {
            "anyOf": [
                {"properties": {"top_logprobs": {"enum": [None, 0]}}},
                {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
            ]
        },
    ]
}
"""The constraints of `_fits_together` as JSON Schema, for `/openapi.json`."""
_NO_TOOLS = "tools are not supported"


def _whole(value: object) -> Json:
    """Converts integral floats to int: JSON does not distinguish 2.0 from 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _off(value: bool) -> bool:
    """Accepts only False; a Literal would accept 0 as well."""
    if value:
        raise ValueError("must be false")
    return value


Off = Annotated[bool, AfterValidator(_off), WithJsonSchema({"const": False})]
Penalty = Annotated[float, Field(ge=-2, le=2)]
NewTokens = Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS), BeforeValidator(_whole)]
TopK = Annotated[int, Field(ge=-1, le=MAX_COUNT), BeforeValidator(_whole)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63), BeforeValidator(_whole)]
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES), BeforeValidator(_whole)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), BeforeValidator(_whole)]
Empty = Annotated[list[Json], Field(max_length=0)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


def _as_in_engine(name: str) -> str:
    """Returns the description of a field that the engine's sampling parameters have too."""
    field = SamplingParams.model_fields[name]
    assert field.description, "every sampling parameter is described"
    if field.default in (None, {}):
        return field.description
    return f"{field.description} By default {field.default:g}."


class StreamOptions(Strict):
    """The fields of `stream_options`."""

    include_usage: bool | None = Field(
        None, description="End the stream with a chunk that contains the token counts."
    )
    include_obfuscation: Annotated[Off | None, Neutral("false", "chunks are not padded")] = None


class TextFormat(Strict):
    """The only supported `response_format`: free text."""

    type: Literal["text"] = Field(description="Free text.")


class CacheOptions(Strict):
    """The only supported `prompt_cache_options`: automatic prefix caching."""

    mode: Literal["implicit"] | None = Field(None, description="Automatic prefix caching.")


class ChatRequest(Strict):
    """A chat request; `top_k` extends OpenAI's fields (-1 and 0 disable it)."""

    model_config = ConfigDict(json_schema_extra=_TOGETHER)

    model: str = Field(description="Name of a served model.")
    messages: list[ChatMessage] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="The conversation so far; the model generates the next assistant message.",
    )
    stream: bool | None = Field(
        None, description="Send the tokens as server-sent events while they are generated."
    )
    stream_options: StreamOptions | None = Field(
        None, description="Options of a stream; require `stream`."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description=_as_in_engine("temperature")
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description=_as_in_engine("top_p")
    )
    top_k: TopK | None = Field(
        None, description=_as_in_engine("top_k").replace("0 disables", "0 and -1 disable")
    )
    seed: Seed | None = Field(None, description=_as_in_engine("seed"))
    max_tokens: NewTokens | None = Field(None, description=_as_in_engine("max_tokens"))
    max_completion_tokens: NewTokens | None = Field(
        None, description="Newer name of `max_tokens`; mutually exclusive with it."
    )
    stop: Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = Field(
        None,
        json_schema_extra={
            "anyOf": [
                _STOP_SCHEMA,
                {"type": "array", "items": _STOP_SCHEMA, "maxItems": MAX_STOPS},
                {"type": "null"},
            ]
        },
        description="A stop string, or a list of them; they end the completion and are not part "
        "of it.",
    )
    n: Choices | None = Field(None, description=_as_in_engine("n"))
    frequency_penalty: Penalty | None = Field(None, description=_as_in_engine("frequency_penalty"))
    presence_penalty: Penalty | None = Field(None, description=_as_in_engine("presence_penalty"))
    logit_bias: (
        Annotated[dict[Count, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
        | None
    ) = Field(
        None,
        json_schema_extra={"propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"}},
        description=_as_in_engine("logit_bias"),
    )
    logprobs: bool | None = Field(
        None, description="Report the log-probability of each generated token."
    )
    top_logprobs: TopLogprobs | None = Field(
        None,
        description="Number of most likely tokens to report at each position; requires `logprobs`.",
    )
    service_tier: Literal["auto", "default"] | None = Field(
        None, description="Returned as default; there is only one tier."
    )

    # fields that do not influence the completion
    user: Annotated[str | None, Neutral("text", "it names the end user")] = None
    safety_identifier: Annotated[str | None, Neutral("text", "it names the end user")] = None
    prompt_cache_key: Annotated[
        str | None, Neutral("text", "prefixes are cached whatever its value")
    ] = None
    metadata: Annotated[
        Metadata | None,
        Neutral("at most 16 texts of at most 512 characters", "it labels the request"),
    ] = None

    # fields that could influence the completion, accepted only at values that do not
    tools: Annotated[Empty | None, Neutral("[]", _NO_TOOLS)] = None
    functions: Annotated[Empty | None, Neutral("[]", _NO_TOOLS)] = None
    tool_choice: Annotated[
        Literal["none", "auto"] | None, Neutral('"none" or "auto"', _NO_TOOLS)
    ] = None
    function_call: Annotated[
        Literal["none", "auto"] | None, Neutral('"none" or "auto"', _NO_TOOLS)
    ] = None
    parallel_tool_calls: Annotated[bool | None, Neutral("true or false", _NO_TOOLS)] = None
    response_format: Annotated[
        TextFormat | None, Neutral('{"type": "text"}', "other formats are not supported")
    ] = None
    modalities: Annotated[
        Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None,
        Neutral('["text"]', "audio is not supported"),
    ] = None
    store: Annotated[Off | None, Neutral("false", "completions are not stored")] = None
    verbosity: Annotated[
        Literal["medium"] | None, Neutral('"medium"', "models here have no such setting")
    ] = None
    reasoning_effort: Annotated[
        Literal["none"] | None, Neutral('"none"', "models here have no such setting")
    ] = None
    prompt_cache_retention: Annotated[
        Literal["in_memory"] | None,
        Neutral('"in_memory"', "prefixes are cached while memory allows"),
    ] = None
    prompt_cache_options: Annotated[
        CacheOptions | None,
        Neutral('{} or {"mode": "implicit"}', "prefixes are cached while memory allows"),
    ] = None

    audio: Annotated[None, Refused("audio is not supported")] = None
    moderation: Annotated[None, Refused("moderation is not supported")] = None
    prediction: Annotated[None, Refused("predicted output is not supported")] = None
    web_search_options: Annotated[None, Refused("web search is not supported")] = None

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, stop: object) -> Json:
        """Wraps a single text in a list; a union type would report errors of the wrong member."""
        return [stop] if isinstance(stop, str) else stop

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _by_id(cls, bias: object) -> Json:
        """Converts string keys to token ids; rejects "05", which would duplicate "5"."""
        if not isinstance(bias, dict):
            return bias
        for key in bias:
            if not _TOKEN_ID.fullmatch(key):
                raise ValueError(f"the key {key!r} is not a token id, such as 42")
        return {int(key): value for key, value in bias.items()}

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens:
            raise _conflict("max_tokens", "give max_tokens or max_completion_tokens, not both")
        if self.stream_options is not None and not self.stream:
            raise _conflict("stream_options", "stream_options needs stream=true")
        if self.top_logprobs and not self.logprobs:
            raise _conflict("top_logprobs", "top_logprobs needs logprobs=true")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether the stream should end with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self) -> SamplingParams:
        """Returns the engine's sampling parameters; absent fields get OpenAI's defaults."""
        return SamplingParams(
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=max(self.top_k or 0, 0),
            seed=self.seed,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            stop=tuple(self.stop or ()),
            n=self.n or 1,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


def read_chat(body: JsonObject) -> ChatRequest:
    """Validates a parsed body as a chat request.

    Raises:
        APIError: a field is invalid, unknown or unsupported; the error names it.
    """
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as error:
        raise as_api_error(error, ChatRequest) from None


def _conflict(param: str, message: str) -> APIError:
    """Returns an error about two conflicting fields, reported under one of them."""
    return APIError(400, message, param=param, code="invalid_value")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
