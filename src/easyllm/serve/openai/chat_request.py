"""Fields of `POST /v1/chat/completions`: every field of OpenAI's published schema.

Each is honoured, accepted at values that have no effect (`Neutral`), or rejected by name
(`Refused`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from easyllm.core.json_types import Json, JsonMapping
from easyllm.engine.params import SamplingParams
from easyllm.serve.constraints import TRUE, all_of, needs, only_one
from easyllm.serve.errors import APIError
from easyllm.serve.job import Conversation, Job, Reasoning, ToolChoice
from easyllm.serve.openai.messages import ChatMessage, template_messages
from easyllm.serve.openai.sampling_fields import (
    NewTokens,
    Off,
    SamplingFields,
    WholeCount,
    as_in_engine,
    whole,
)
from easyllm.serve.openai.structured import ResponseFormat, StructuredOutputs, one_guide
from easyllm.serve.openai.tools import (
    MAX_TOOLS,
    TOOL_CHOICE_SCHEMA,
    Tool,
    check_choice,
    read_tool_choice,
    template_tools,
)
from easyllm.serve.treatment import Neutral, Refused, Strict

MAX_MESSAGES = 2_000
MAX_TOP_LOGPROBS = 20  # OpenAI's limit
_TOGETHER = all_of(
    only_one("max_tokens", "max_completion_tokens"),
    needs("stream_options", stream=TRUE),
    needs("top_logprobs", unless=[0], logprobs=TRUE),
    needs("continue_final_message", unless=[False], add_generation_prompt={"const": False}),
)
"""Constraints of `_fits_together` as JSON Schema, for `/openapi.json`.

Not all of them: schemathesis 4.32 cannot generate requests for more than four alternatives.
"""
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), BeforeValidator(whole)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


class StreamOptions(Strict):
    """The fields of `stream_options`."""

    include_usage: bool | None = Field(
        None, description="End the stream with a chunk that contains the token counts."
    )
    continuous_usage_stats: bool | None = Field(
        None, description="Send the token counts so far with every chunk."
    )
    include_obfuscation: Annotated[Off | None, Neutral("false", "chunks are not padded")] = None


class CacheOptions(Strict):
    """The only supported `prompt_cache_options`: automatic prefix caching."""

    mode: Literal["implicit"] | None = Field(None, description="Automatic prefix caching.")


class ChatRequest(SamplingFields):
    """A chat request: OpenAI's fields, and those with which vLLM extends them."""

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
    max_tokens: NewTokens | None = Field(None, description=as_in_engine("max_tokens"))
    max_completion_tokens: NewTokens | None = Field(
        None, description="Newer name of `max_tokens`; mutually exclusive with it."
    )
    logprobs: bool | None = Field(
        None, description="Report the log-probability of each generated token."
    )
    top_logprobs: TopLogprobs | None = Field(
        None,
        description="Number of most likely tokens to report at each position; requires `logprobs`.",
    )
    token_details: bool | None = Field(
        None,
        description="Add to each log-probability the entropy of the distribution, and what the "
        "form of the answer has excluded; requires `logprobs`.",
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: Annotated[
        Any, BeforeValidator(read_tool_choice), WithJsonSchema(TOOL_CHOICE_SCHEMA)
    ] = Field(
        None,
        description="Whether tools may (auto), must (required) or must not (none) be called, or "
        "the one that must be. By default auto.",
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether one answer may contain several tool calls. By default true."
    )
    response_format: ResponseFormat | None = Field(
        None, description="The form of the answer: text, a JSON object, or JSON of a schema."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="The form of the answer, by vLLM's options."
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        Field(
            None,
            description="How much a reasoning model reasons: none switches it off, the others "
            "bound its tokens (minimal 256, low 1,024, medium 4,096; high, xhigh and max do not).",
        )
    )
    thinking_token_budget: WholeCount | None = Field(
        None, description="Maximum number of reasoning tokens; 0 switches reasoning off."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Whether the header of an assistant turn follows. By default true."
    )
    continue_final_message: bool | None = Field(
        None,
        description="Continue the last message, which is the assistant's, instead of answering it; "
        "requires `add_generation_prompt` to be false.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the chat template, such as enable_thinking."
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
    functions: Annotated[
        Annotated[list[Json], Field(max_length=0)] | None, Neutral("[]", "use tools instead")
    ] = None
    function_call: Annotated[
        Literal["none", "auto"] | None, Neutral('"none" or "auto"', "use tool_choice instead")
    ] = None
    modalities: Annotated[
        Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None,
        Neutral('["text"]', "audio is not supported"),
    ] = None
    store: Annotated[Off | None, Neutral("false", "completions are not stored")] = None
    verbosity: Annotated[
        Literal["medium"] | None, Neutral('"medium"', "models here have no such setting")
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

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens:
            raise conflict("max_tokens", "give max_tokens or max_completion_tokens, not both")
        if self.stream_options is not None and not self.stream:
            raise conflict("stream_options", "stream_options needs stream=true")
        most = self.max_completion_tokens or self.max_tokens
        if most is not None and (self.min_tokens or 0) > most:
            raise conflict("min_tokens", "min_tokens is more than max_tokens; lower it")
        if self.continue_final_message and self.add_generation_prompt is not False:
            raise conflict(
                "continue_final_message",
                "continue_final_message needs add_generation_prompt=false",
            )
        self._check_tools()
        if self.top_logprobs and not self.logprobs:
            raise conflict("top_logprobs", "top_logprobs needs logprobs=true")
        if self.token_details and not self.logprobs:
            raise conflict("token_details", "token_details needs logprobs=true")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether the stream should end with a usage chunk."""
        options = self.stream_options
        return options is not None and bool(options.include_usage or self.wants_running_usage)

    @property
    def wants_running_usage(self) -> bool:
        """Whether every chunk of the stream should have the token counts so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def job(self, defaults: JsonMapping | None = None) -> Job:
        """Returns the request in the form common to all dialects.

        Args:
            defaults: the model's own defaults of the sampling parameters.

        Raises:
            APIError: a schema is malformed, or two fields contradict each other.
        """
        guide, field = one_guide(self.response_format, self.structured_outputs)
        return Job(
            model=self.model,
            prompt=Conversation(
                messages=template_messages(self.messages),
                tools=template_tools(self.tools),
                variables=self.chat_template_kwargs or {},
                continue_final_message=bool(self.continue_final_message),
                add_generation_prompt=self.add_generation_prompt is not False,
            ),
            params=self.sampling(defaults),
            guide=guide,
            guide_field=field,
            tool_choice=ToolChoice.of(self.tool_choice, self.parallel_tool_calls),
            reasoning=self._reasoning(),
            salt=self.cache_salt or "",
        )

    def sampling(self, defaults: JsonMapping | None = None, **others: Any) -> SamplingParams:
        """Returns the engine's sampling parameters; absent fields get the defaults."""
        return super().sampling(
            defaults,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            **others,
        )

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise conflict("tools", f"two tools are named {repeated!r}; rename one")
        check_choice(self.tool_choice, names)

    def _reasoning(self) -> Reasoning:
        if self.thinking_token_budget is not None:
            return Reasoning(
                on=self.thinking_token_budget > 0, budget=self.thinking_token_budget or None
            )
        return reasoning_of(self.reasoning_effort)


EFFORT_BUDGETS: Mapping[str, int] = {"minimal": 256, "low": 1024, "medium": 4096}
"""Maximum number of reasoning tokens by effort; the other efforts have no bound."""


def reasoning_of(effort: str | None) -> Reasoning:
    """Returns what an effort means for the reasoning of a model."""
    if effort is None:
        return Reasoning()
    return Reasoning(on=effort != "none", budget=EFFORT_BUDGETS.get(effort))


def conflict(param: str, message: str) -> APIError:
    """Returns an error about two conflicting fields, reported under one of them."""
    return APIError(400, message, param=param, code="invalid_value")
