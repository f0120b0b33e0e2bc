"""Fields of `POST /v1/responses` (OpenAI's Responses API).

Each is honoured, accepted at values that have no effect (`Neutral`), or rejected by name
(`Refused`), as in the chat dialect.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from easyllm.core.json_types import Json, JsonMapping, JsonObject
from easyllm.engine.guide_spec import GuideSpec
from easyllm.engine.params import SamplingParams
from easyllm.serve.constraints import TRUE, all_of, needs
from easyllm.serve.errors import APIError
from easyllm.serve.job import Conversation, Job, ToolChoice
from easyllm.serve.openai.chat_request import Metadata, TopLogprobs, reasoning_of
from easyllm.serve.openai.sampling_fields import NewTokens, Off
from easyllm.serve.openai.structured import guide_spec
from easyllm.serve.openai.tools import (
    MAX_TOOLS,
    Schema,
    ToolName,
    check_choice,
    function_definition,
)
from easyllm.serve.responses.items import INPUT_SCHEMA, read_input, template_messages
from easyllm.serve.treatment import Neutral, Refused, Strict
from easyllm.tokenizer import normalise_messages

Includable = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]
"""Values of `include` that are accepted; the second is null, because nothing is encrypted."""


class ResponseTool(BaseModel):
    """A function that the model may call; fields that are not declared here are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["function"] = Field(description="Type of the tool.")
    name: ToolName = Field(description="Name of the function.")
    description: str | None = Field(None, description="What it does, for the model.")
    parameters: Schema | None = Field(None, description="JSON Schema of its arguments.")
    strict: Annotated[
        bool | None, Neutral("true or false", "arguments always follow the schema")
    ] = None


_NEEDS_SCHEMA: JsonDict = {
    "anyOf": [
        {"properties": {"type": {"enum": ["text", "json_object"]}}},
        {"properties": {"schema": {"type": ["object", "boolean"]}}, "required": ["schema"]},
    ]
}


class TextFormat(Strict):
    """The form of the text: free, a JSON object, or JSON that follows a schema."""

    model_config = ConfigDict(json_schema_extra=_NEEDS_SCHEMA)

    type: Literal["text", "json_object", "json_schema"] = Field(description="Form of the text.")
    name: Annotated[str | None, Neutral("text", "the schema alone decides")] = None
    description: Annotated[str | None, Neutral("text", "the schema alone decides")] = None
    schema_: Schema | None = Field(
        None, alias="schema", description="The JSON Schema that the text follows."
    )
    strict: Annotated[
        bool | None, Neutral("true or false", "the text always follows the schema")
    ] = None


class TextConfig(Strict):
    """Options of the text of an answer."""

    format: TextFormat | None = Field(None, description="The form of the text.")
    verbosity: Annotated[
        Literal["medium"] | None, Neutral('"medium"', "models here have no such setting")
    ] = None


class ReasoningConfig(Strict):
    """How much a reasoning model reasons."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="As `reasoning_effort` of the chat dialect."
    )
    summary: Annotated[
        Literal["auto", "concise", "detailed"] | None,
        Neutral("auto, concise or detailed", "the reasoning itself is sent"),
    ] = None
    generate_summary: Annotated[None, Refused("the reasoning itself is sent")] = None


class ResponseStreamOptions(Strict):
    """Options of a stream."""

    include_obfuscation: Annotated[Off | None, Neutral("false", "chunks are not padded")] = None


_CHOICE_SCHEMA: JsonObject = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        {
            "type": "object",
            "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
            "required": ["type", "name"],
        },
    ]
}


def _read_choice(choice: object) -> Json:
    """Returns `none`, `auto`, `required`, or a tuple with the name of the function to call."""
    if choice is None or choice in ("none", "auto", "required"):
        return choice
    if isinstance(choice, dict) and choice.get("type") == "function":
        name = choice.get("name")
        if isinstance(name, str):
            return (name,)
    raise PydanticCustomError(
        "tool_choice_value",
        'the choice is not supported; send "none", "auto", "required" or '
        '{{"type": "function", "name": "..."}}',
    )


class ResponseRequest(Strict):
    """A request for a response."""

    model_config = ConfigDict(
        json_schema_extra=all_of(
            needs("stream_options", stream=TRUE),
            needs("tool_choice", unless=["none", "auto"], tools={"type": "array", "minItems": 1}),
        )
    )

    model: str = Field(description="Name of a served model.")
    input: Annotated[
        Any,
        BeforeValidator(read_input),
        WithJsonSchema(INPUT_SCHEMA),
    ] = Field(
        description="Text of the user, or a list of items: messages, function calls and their "
        "outputs, reasoning."
    )
    instructions: str | None = Field(None, description="System prompt of this response.")
    previous_response_id: str | None = Field(
        None, description="Id of a stored response, whose conversation is continued."
    )
    store: bool | None = Field(
        None, description="Keep the response in memory, to be continued. By default true."
    )
    stream: bool | None = Field(None, description="Send server-sent events while it is generated.")
    stream_options: ResponseStreamOptions | None = Field(None, description="Options of a stream.")
    max_output_tokens: NewTokens | None = Field(
        None, description="Maximum number of tokens to generate, reasoning included."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="Divisor of the logits; 0 selects the most likely token."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Sample only from the most likely tokens of this total probability."
    )
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: Annotated[
        Any,
        BeforeValidator(_read_choice),
        WithJsonSchema(_CHOICE_SCHEMA),
    ] = Field(
        None,
        description="Whether tools may (auto), must (required) or must not (none) be called, or "
        "the one that must be. By default auto.",
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether one answer may contain several tool calls. By default true."
    )
    text: TextConfig | None = Field(None, description="Options of the text of the answer.")
    reasoning: ReasoningConfig | None = Field(
        None, description="How much a reasoning model reasons."
    )
    top_logprobs: TopLogprobs | None = Field(
        None, description="Number of most likely tokens to report at each position."
    )
    include: list[Includable] | None = Field(
        None, description="message.output_text.logprobs adds log-probabilities to the text."
    )
    metadata: Metadata | None = Field(None, description="Labels, which the response repeats.")

    # fields that do not influence the response
    user: Annotated[str | None, Neutral("text", "it names the end user")] = None
    safety_identifier: Annotated[str | None, Neutral("text", "it names the end user")] = None
    prompt_cache_key: Annotated[
        str | None, Neutral("text", "prefixes are cached whatever its value")
    ] = None
    prompt_cache_retention: Annotated[
        Literal["in_memory"] | None,
        Neutral('"in_memory"', "prefixes are cached while memory allows"),
    ] = None
    service_tier: Annotated[
        Literal["auto", "default"] | None, Neutral("auto or default", "there is only one tier")
    ] = None
    truncation: Annotated[
        Literal["disabled"] | None, Neutral('"disabled"', "the conversation is never shortened")
    ] = None
    background: Annotated[Off | None, Neutral("false", "responses are not run later")] = None
    max_tool_calls: Annotated[
        int | None, Neutral("a number", "no tools run on the server, to which it applies")
    ] = None

    conversation: Annotated[None, Refused("use previous_response_id")] = None
    prompt: Annotated[None, Refused("prompts are not stored")] = None
    moderation: Annotated[None, Refused("moderation is not supported")] = None
    image: Annotated[None, Refused("images are not supported")] = None
    context_management: Annotated[None, Refused("the context is not edited")] = None
    background_options: Annotated[None, Refused("responses are not run later")] = None
    access_programs: Annotated[None, Refused("there are none")] = None

    @model_validator(mode="after")
    def _fits_together(self) -> "ResponseRequest":
        names = [tool.name for tool in self.tools or ()]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            message = f"two tools are named {repeated!r}; rename one"
            raise APIError(400, message, param="tools", code="invalid_value")
        check_choice(self.tool_choice, names)
        if self.stream_options is not None and not self.stream:
            message = "stream_options needs stream=true"
            raise APIError(400, message, param="stream_options", code="invalid_value")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are reported."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())

    def job(self, items: list[JsonObject], defaults: JsonMapping | None = None) -> Job:
        """Returns the request in the form common to all dialects.

        Args:
            items: items of the whole conversation, the input included.
            defaults: the model's own defaults of the sampling parameters.

        Raises:
            APIError: a schema is malformed.
        """
        messages = template_messages(items)
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        return Job(
            model=self.model,
            prompt=Conversation(
                messages=normalise_messages(messages),
                tools=[
                    function_definition(tool.name, tool.description, tool.parameters)
                    for tool in self.tools or ()
                ],
            ),
            params=self._sampling(defaults),
            guide=self._guide(),
            guide_field="text.format",
            tool_choice=ToolChoice.of(self.tool_choice, self.parallel_tool_calls),
            reasoning=reasoning_of(None if self.reasoning is None else self.reasoning.effort),
        )

    def _sampling(self, defaults: JsonMapping | None) -> SamplingParams:
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_output_tokens,
            "logprobs": (self.top_logprobs or 0) if self.wants_logprobs else None,
        }
        values = dict(defaults or {})
        return SamplingParams(**values | {k: v for k, v in given.items() if v is not None})

    def _guide(self) -> GuideSpec | None:
        form = None if self.text is None else self.text.format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return GuideSpec(json_object=True)
        if form.schema_ is None:
            message = "text.format of type json_schema needs a schema"
            raise APIError(
                400, message, param="text.format.schema", code="missing_required_parameter"
            )
        return guide_spec({"json_schema": form.schema_}, "text.format")
