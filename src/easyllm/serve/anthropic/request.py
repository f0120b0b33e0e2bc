"""Fields of `POST /v1/messages` and `/v1/messages/count_tokens` (Anthropic's Messages API).

Each is honoured, accepted at values that have no effect (`Neutral`), or rejected by name
(`Refused`), as in OpenAI's dialect.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from easyllm.core.json_types import Json, JsonMapping, JsonObject
from easyllm.engine.guide_spec import GuideSpec
from easyllm.engine.params import SamplingParams
from easyllm.serve.anthropic.blocks import (
    TEXTS_SCHEMA,
    AnthropicMessage,
    template_message,
    text_of,
)
from easyllm.serve.constraints import described_object
from easyllm.serve.errors import APIError
from easyllm.serve.job import Conversation, Job, Reasoning, ToolChoice
from easyllm.serve.openai.chat_request import MAX_MESSAGES, reasoning_of
from easyllm.serve.openai.sampling_fields import NewTokens, Stops, TopK, whole
from easyllm.serve.openai.structured import guide_spec
from easyllm.serve.openai.tools import (
    MAX_TOOLS,
    Schema,
    ToolName,
    check_choice,
    function_definition,
)
from easyllm.serve.treatment import Neutral, Refused, Strict
from easyllm.tokenizer import normalise_messages


class AnthropicTool(BaseModel):
    """A function that the model may call; fields that are not declared here are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["custom"] | None = Field(None, description="Type of the tool.")
    name: ToolName = Field(description="Name of the tool.")
    description: str | None = Field(None, description="What it does, for the model.")
    input_schema: Schema = Field(description="JSON Schema of its arguments.")


_NAME_WITH_TOOL: JsonDict = {
    "if": {"properties": {"type": {"const": "tool"}}},
    "then": {"properties": {"name": {"type": "string", "minLength": 1}}, "required": ["name"]},
    "else": {"properties": {"name": {"type": "null"}}},
}


class AnthropicToolChoice(Strict):
    """Which tools may or must be called."""

    model_config = ConfigDict(json_schema_extra=_NAME_WITH_TOOL)

    type: Literal["auto", "any", "tool", "none"] = Field(
        description="auto, any (at least one call), tool (the named one), or none."
    )
    name: str | None = Field(None, description="Name of the tool, with type tool.")
    disable_parallel_tool_use: bool | None = Field(
        None, description="Whether an answer contains at most one call. By default false."
    )


_NEEDS_BUDGET: JsonDict = {
    "anyOf": [
        {"properties": {"type": {"enum": ["disabled", "adaptive"]}}},
        {"properties": {"budget_tokens": {"type": "integer"}}, "required": ["budget_tokens"]},
    ]
}


class Thinking(Strict):
    """Whether and how long a reasoning model reasons."""

    model_config = ConfigDict(json_schema_extra=_NEEDS_BUDGET)

    type: Literal["enabled", "disabled", "adaptive"] = Field(
        description="enabled, disabled, or adaptive (the model decides)."
    )
    budget_tokens: Annotated[int, Field(ge=1), BeforeValidator(whole)] | None = Field(
        None, description="Maximum number of reasoning tokens; required with enabled."
    )
    display: Annotated[
        Literal["summarized", "omitted"] | None,
        Neutral("summarized or omitted", "the reasoning is sent as it is"),
    ] = None


class OutputFormat(Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"] = Field(description="Form of the text.")
    schema_: Schema = Field(alias="schema", description="The JSON Schema that the text follows.")


class OutputConfig(Strict):
    """The form of the answer, and how much a reasoning model reasons."""

    format: OutputFormat | None = Field(None, description="The form of the answer.")
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="How much a reasoning model reasons; low and medium bound its tokens."
    )


def _read_system(system: object) -> Json:
    """Accepts text, or a list of text blocks."""
    if system is None or isinstance(system, str):
        return system
    texts = isinstance(system, list) and all(
        isinstance(b, dict) and b.get("type") == "text" and isinstance(b.get("text"), str)
        for b in system
    )
    if not texts:
        raise PydanticCustomError(
            "content_value", "the system prompt is not text; send text or a list of text blocks"
        )
    return system


_KEEPS_ALL = "edits that keep everything"
_KEEPS_ALL_SCHEMA: JsonObject = {
    "type": ["object", "null"],
    "properties": {
        "edits": {"type": ["array", "null"], "items": described_object(keep={"const": "all"})}
    },
}


def _keeps_all(management: object) -> Json:
    """Accepts only edits that leave the conversation as it is."""
    edits = management.get("edits") if isinstance(management, dict) else None
    keep = isinstance(edits, list) and all(
        isinstance(edit, dict) and edit.get("keep") == "all" for edit in edits
    )
    if management is None or (isinstance(management, dict) and (edits is None or keep)):
        return management
    raise ValueError("the context is not edited")


_CHOICE_NEEDS_TOOLS: JsonDict = {
    "anyOf": [
        {"properties": {"tool_choice": {"type": "null"}}},
        {"properties": {"tool_choice": {"properties": {"type": {"enum": ["auto", "none"]}}}}},
        {"properties": {"tools": {"type": "array", "minItems": 1}}, "required": ["tools"]},
    ]
}


class CountRequest(Strict):
    """A request to count the tokens of a conversation."""

    model_config = ConfigDict(json_schema_extra=_CHOICE_NEEDS_TOOLS)

    model: str = Field(description="Name of a served model.")
    messages: list[AnthropicMessage] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="The conversation so far. A last message of the assistant is continued.",
    )
    system: Annotated[
        Any,
        BeforeValidator(_read_system),
        WithJsonSchema({"anyOf": [*TEXTS_SCHEMA["anyOf"], {"type": "null"}]}),
    ] = Field(None, description="System prompt: text, or a list of text blocks.")
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: AnthropicToolChoice | None = Field(
        None, description="Which tools may or must be called. By default auto."
    )
    thinking: Thinking | None = Field(
        None, description="Whether and how long a reasoning model reasons."
    )
    output_config: OutputConfig | None = Field(
        None, description="The form of the answer, and how much a reasoning model reasons."
    )
    cache_control: Annotated[
        Json, Neutral("any value", "prefixes are cached while memory allows")
    ] = None
    mcp_servers: Annotated[
        Annotated[list[Json], Field(max_length=0)] | None, Neutral("[]", "MCP is not supported")
    ] = None
    context_management: Annotated[
        Json,
        BeforeValidator(_keeps_all),
        WithJsonSchema(_KEEPS_ALL_SCHEMA),
        Neutral(_KEEPS_ALL, "the context is not edited"),
    ] = None

    @model_validator(mode="after")
    def _fits_together(self) -> "CountRequest":
        names = [tool.name for tool in self.tools or ()]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise _conflict("tools", f"two tools are named {repeated!r}; rename one")
        choice = self.tool_choice
        if choice is not None and (choice.type == "tool") != (choice.name is not None):
            raise _conflict("tool_choice", "a name belongs to type tool, and to no other")
        if choice is not None and choice.type in ("any", "tool"):
            check_choice("required" if choice.name is None else (choice.name,), names)
        thinking = self.thinking
        if thinking is not None and thinking.type == "enabled" and thinking.budget_tokens is None:
            raise _conflict("thinking", "thinking of type enabled needs budget_tokens")
        return self

    def conversation(self) -> Conversation:
        """Returns the messages and tools for the chat template."""
        messages: list[JsonObject] = []
        if self.system:
            messages.append({"role": "system", "content": text_of(self.system)})
        for message in self.messages:
            messages += template_message(message)
        continued = self.messages[-1].role == "assistant"
        return Conversation(
            messages=normalise_messages(messages),
            tools=[
                function_definition(tool.name, tool.description, tool.input_schema)
                for tool in self.tools or ()
            ],
            add_generation_prompt=not continued,
            continue_final_message=continued,
        )

    def reasoning(self) -> Reasoning:
        """Returns whether and how long the model reasons.

        Without `thinking`, and if it is adaptive, the chat template decides, as in the other
        dialects; so the same conversation gives the same tokens in all of them.
        """
        effort = None if self.output_config is None else self.output_config.effort
        if self.thinking is None:
            return reasoning_of(effort)
        if self.thinking.type == "adaptive":
            return Reasoning(budget=reasoning_of(effort).budget)
        return Reasoning(on=self.thinking.type == "enabled", budget=self.thinking.budget_tokens)


class MessagesRequest(CountRequest):
    """A request for the assistant's next message."""

    max_tokens: NewTokens = Field(description="Maximum number of tokens to generate.")
    stream: bool | None = Field(
        None, description="Send the message as server-sent events while it is generated."
    )
    stop_sequences: Stops | None = Field(
        None, description="Stop strings; they end the message and are not part of it."
    )
    temperature: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Divisor of the logits; 0 selects the most likely token."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Sample only from the most likely tokens of this total probability."
    )
    top_k: TopK | None = Field(
        None, description="Sample only from the k most likely tokens; 0 and -1 disable it."
    )
    metadata: Annotated[Json, Neutral("an object", "it names the end user")] = None
    service_tier: Annotated[
        Literal["auto", "standard_only"] | None,
        Neutral("auto or standard_only", "there is only one tier"),
    ] = None
    speed: Annotated[
        Literal["standard"] | None, Neutral('"standard"', "there is only one speed")
    ] = None
    user_profile_id: Annotated[str | None, Neutral("text", "it names the end user")] = None
    workspace_id: Annotated[str | None, Neutral("text", "it names the account")] = None
    inference_geo: Annotated[None, Refused("the model runs where the server runs")] = None
    diagnostics: Annotated[None, Refused("there are none")] = None
    container: Annotated[None, Refused("code is not executed")] = None

    def job(self, defaults: JsonMapping | None = None) -> Job:
        """Returns the request in the form common to all dialects.

        Args:
            defaults: the model's own defaults of the sampling parameters.

        Raises:
            APIError: a schema is malformed.
        """
        choice = self.tool_choice or AnthropicToolChoice(type="auto")
        modes: dict[str, Literal["auto", "none", "required", "named"]] = {
            "auto": "auto",
            "any": "required",
            "tool": "named",
            "none": "none",
        }
        return Job(
            model=self.model,
            prompt=self.conversation(),
            params=self._sampling(defaults),
            guide=self._guide(),
            guide_field="output_config.format",
            tool_choice=ToolChoice(
                mode=modes[choice.type],
                name=choice.name,
                parallel=not choice.disable_parallel_tool_use,
            ),
            reasoning=self.reasoning(),
        )

    def _sampling(self, defaults: JsonMapping | None) -> SamplingParams:
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "stop": tuple(self.stop_sequences or ()),
            "max_tokens": self.max_tokens,
        }
        values = dict(defaults or {})
        return SamplingParams(**values | {k: v for k, v in given.items() if v is not None})

    def _guide(self) -> GuideSpec | None:
        config = self.output_config
        if config is None or config.format is None:
            return None
        return guide_spec({"json_schema": config.format.schema_}, "output_config.format")


def _conflict(param: str, message: str) -> APIError:
    return APIError(400, message, param=param, code="invalid_value")
