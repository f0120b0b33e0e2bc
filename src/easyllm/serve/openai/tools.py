"""Tools of a chat request: function definitions and which of them the model may or must call."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from easyllm.core.errors import suggest
from easyllm.core.json_types import Json, JsonObject
from easyllm.serve.errors import APIError
from easyllm.serve.treatment import Neutral, Strict

MAX_TOOLS = 128
ToolName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_.:-]+$")]
Schema = Annotated[dict[str, Any], WithJsonSchema({"type": "object", "additionalProperties": True})]


class FunctionTool(Strict):
    """A function that the model may call."""

    name: ToolName = Field(description="Name of the function.")
    description: str | None = Field(None, description="What it does, for the model.")
    parameters: Schema | None = Field(
        None, description="JSON Schema of its arguments; by default it has none."
    )
    strict: Annotated[
        bool | None, Neutral("true or false", "arguments always follow the schema")
    ] = None


class Tool(Strict):
    """A tool, which is always a function."""

    type: Literal["function"] = Field(description="Type of the tool.")
    function: FunctionTool = Field(description="The function.")


class NamedFunction(Strict):
    """The name of a function."""

    name: ToolName = Field(description="Name of the function.")


class NamedTool(Strict):
    """The choice of one tool."""

    type: Literal["function"] = Field(description="Type of the tool.")
    function: NamedFunction = Field(description="The function that must be called.")


TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}},
                    "required": ["name"],
                },
            },
            "required": ["type", "function"],
        },
    ]
}


_ARGUMENTS = {
    "anyOf": [
        {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"type": "object"},
        },
        {"type": "object"},
        {"type": "null"},
    ]
}


class CalledFunction(BaseModel):
    """The function of a tool call in the conversation; other fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: Annotated[str, Field(min_length=1)] = Field(description="Name of the function.")
    arguments: Annotated[str | dict[str, Any] | None, WithJsonSchema(_ARGUMENTS)] = Field(
        None, description="Its arguments, as JSON text of an object, or as the object."
    )


class ToolCall(BaseModel):
    """A tool call in an assistant message of the conversation; other fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: str | None = Field(None, description="Id of the call, to which its result refers.")
    type: Literal["function"] | None = Field(None, description="Type of the call.")
    function: CalledFunction = Field(description="The function and its arguments.")


def read_tool_choice(choice: object) -> Json:
    """Returns `none`, `auto`, `required`, or a tuple with the name of the function to call.

    Validated by hand, because pydantic reports the errors of every member of a union.
    """
    if choice is None or choice in ("none", "auto", "required"):
        return choice
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(name, str):
        return (name,)
    raise PydanticCustomError(
        "tool_choice_value",
        'the choice is not supported; send "none", "auto", "required" or '
        '{{"type": "function", "function": {{"name": "..."}}}}',
    )


def check_choice(choice: Json, names: Sequence[str]) -> None:
    """Refuses a tool choice that the tools do not allow.

    Args:
        choice: the result of `read_tool_choice`.
        names: names of the tools.

    Raises:
        APIError: a call is required without tools, or of a tool that is not among them.
    """
    if choice in (None, "auto", "none"):
        return
    if not names:
        message = "a tool call is required, but there are no tools; send tools, or leave it out"
        raise APIError(400, message, param="tool_choice", code="invalid_value")
    if isinstance(choice, tuple) and choice[0] not in names:
        hint = suggest(choice[0], names)
        message = f"the tool {choice[0]!r} is not among the tools{hint}"
        raise APIError(400, message, param="tool_choice", code="invalid_value")


def function_definition(
    name: str, description: str | None, parameters: JsonObject | None
) -> JsonObject:
    """Returns a function in the form in which chat templates receive tools."""
    function: JsonObject = {"name": name}
    if description is not None:
        function["description"] = description
    function["parameters"] = parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def template_tools(tools: Sequence[Tool] | None) -> list[JsonObject]:
    """Returns the tools in the form in which chat templates receive them."""
    return [
        function_definition(t.function.name, t.function.description, t.function.parameters)
        for t in tools or ()
    ]
