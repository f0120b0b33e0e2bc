"""Fields of `POST /v1/completions`: text that follows a prompt, without a chat template."""

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from easyllm.core.json_types import Json, JsonMapping, JsonObject
from easyllm.engine.guide_spec import GuideSpec
from easyllm.engine.params import MAX_COUNT, SamplingParams
from easyllm.serve.constraints import TEXT, TRUE, all_of, needs
from easyllm.serve.errors import APIError
from easyllm.serve.openai.chat_request import StreamOptions, conflict
from easyllm.serve.openai.sampling_fields import (
    MAX_CHOICES,
    MAX_NEW_TOKENS,
    SamplingFields,
    as_in_engine,
    whole,
)
from easyllm.serve.openai.structured import (
    ONE_GUIDE,
    ResponseFormat,
    StructuredOutputs,
    one_guide,
)
from easyllm.serve.treatment import Neutral

MAX_PROMPTS = 1_024
MAX_LOGPROBS = 20
DEFAULT_TOKENS = 16
"""OpenAI's default of `max_tokens` in completions."""
Prompts = list[str] | list[list[int]]


def read_prompts(prompt: object) -> Json:
    """Returns the prompts as a list of texts or of lists of token ids.

    Validated by hand, because pydantic reports the errors of every member of a union.
    """
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(each, str) for each in prompt):
            return _few(prompt)
        if (ids := _token_ids(prompt)) is not None:
            return [ids]
        lists = [_token_ids(each) if isinstance(each, list) and each else None for each in prompt]
        if None not in lists:
            return _few(lists)
    raise PydanticCustomError(
        "prompt_value",
        "the prompt is not a text, a list of texts, a list of token ids or a list of such lists",
    )


def _few(prompts: list[Any]) -> list[Any]:
    if len(prompts) > MAX_PROMPTS:
        raise PydanticCustomError(
            "prompt_value", f"there are {len(prompts)} prompts; the maximum is {MAX_PROMPTS}"
        )
    return prompts


def _token_ids(values: list[Any]) -> list[int] | None:
    """Returns a list of token ids; None if it is none."""
    ids = [whole(value) for value in values]
    return ids if all(type(each) is int and 0 <= each <= MAX_COUNT for each in ids) else None


_IDS: JsonObject = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_COUNT},
    "minItems": 1,
}
_SEVERAL: JsonObject = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS}
PROMPT_SCHEMA: JsonObject = {
    "anyOf": [TEXT, {**_SEVERAL, "items": TEXT}, _IDS, {**_SEVERAL, "items": _IDS}]
}
PromptsField = Annotated[Any, BeforeValidator(read_prompts), WithJsonSchema(PROMPT_SCHEMA)]


_TOGETHER = all_of(
    needs("stream_options", stream=TRUE),
    {
        "anyOf": [
            {"not": {"properties": {"max_tokens": {"const": 0}}, "required": ["max_tokens"]}},
            {"properties": {"echo": TRUE}, "required": ["echo"]},
        ]
    },
    ONE_GUIDE,
)
"""Constraints of `_fits_together` as JSON Schema; those that compare numbers it cannot express."""


class CompletionRequest(SamplingFields):
    """A request for text that follows one or several prompts."""

    model_config = ConfigDict(json_schema_extra=_TOGETHER)

    model: str = Field(description="Name of a served model.")
    prompt: PromptsField = Field(
        description="Text or token ids, or a list of them; the names of special tokens in a text "
        "are encoded as these tokens."
    )
    stream: bool | None = Field(
        None, description="Send the tokens as server-sent events while they are generated."
    )
    stream_options: StreamOptions | None = Field(
        None, description="Options of a stream; require `stream`."
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_NEW_TOKENS), BeforeValidator(whole)] | None = (
        Field(
            None,
            description="Maximum number of tokens to generate; 0 with `echo` only reads "
            f"the prompt. By default {DEFAULT_TOKENS}.",
        )
    )
    echo: bool | None = Field(None, description="Begin the text with the prompt.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), BeforeValidator(whole)] | None = Field(
        None,
        description="Report the log-probability of each token, and of this many most likely ones; "
        "with `echo` also of the prompt's.",
    )
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES), BeforeValidator(whole)] | None = Field(
        None, description=as_in_engine("best_of")
    )
    add_special_tokens: bool | None = Field(
        None, description="Whether BOS and the like are added to a text. By default true."
    )
    response_format: ResponseFormat | None = Field(
        None, description="The form of the text: free, a JSON object, or JSON of a schema."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="The form of the text, by vLLM's options."
    )
    suffix: Annotated[
        str | None, Field(max_length=0), Neutral('""', "infilling is not supported")
    ] = None
    user: Annotated[str | None, Neutral("text", "it names the end user")] = None

    @model_validator(mode="after")
    def _fits_together(self) -> "CompletionRequest":
        if self.stream_options is not None and not self.stream:
            raise conflict("stream_options", "stream_options needs stream=true")
        if self.max_tokens == 0 and not self.echo:
            raise conflict("max_tokens", "max_tokens=0 generates nothing; raise it, or add echo")
        if (self.min_tokens or 0) > self._limit:
            raise conflict("min_tokens", "min_tokens is more than max_tokens; lower it")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise conflict("best_of", "best_of is less than n; raise it")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise conflict(
                "best_of",
                "the best completions are known only at the end; leave out stream or best_of",
            )
        return self

    @property
    def _limit(self) -> int:
        return DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def wants_usage(self) -> bool:
        """Whether the stream should end with a usage chunk."""
        options = self.stream_options
        return options is not None and bool(options.include_usage or options.continuous_usage_stats)

    @property
    def wants_running_usage(self) -> bool:
        """Whether every chunk of the stream should have the token counts so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def sampling(self, defaults: JsonMapping | None = None, **others: Any) -> SamplingParams:
        """Returns the engine's sampling parameters; absent fields get the defaults.

        With `max_tokens` 0, one token is generated, which the response leaves out.
        """
        return super().sampling(
            defaults,
            max_tokens=max(self._limit, 1),
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
            best_of=self.best_of,
            **others,
        )

    def guide(self) -> tuple[GuideSpec | None, str]:
        """Returns the form of the text, None if it is free, and the field that gives it.

        Raises:
            APIError: a schema is malformed, or two forms are given.
        """
        return one_guide(self.response_format, self.structured_outputs)


def checked(request: CompletionRequest) -> None:
    """Refuses a request for more completions than one response may contain.

    Raises:
        APIError: there are too many.
    """
    most = MAX_PROMPTS
    wanted = len(request.prompt) * (request.n or 1)
    if wanted > most:
        message = f"{len(request.prompt)} prompts with n={request.n} are more than {most} choices"
        raise APIError(400, message, param="n", code="invalid_value")
