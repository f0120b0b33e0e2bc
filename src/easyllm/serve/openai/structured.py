"""Fields that restrict the text of a completion: OpenAI's `response_format`, vLLM's options."""

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, WithJsonSchema
from pydantic.config import JsonDict

from easyllm.core.config import validate
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.engine.guide_spec import MAX_CHOICES, Choice, GuideSpec
from easyllm.serve.constraints import only_one
from easyllm.serve.errors import APIError
from easyllm.serve.treatment import Neutral, Strict

Pattern = Annotated[str, Field(min_length=1)]
Schema = Annotated[dict[str, Any] | bool, WithJsonSchema({"type": ["object", "boolean"]})]


_NEEDS_SCHEMA: JsonDict = {
    "anyOf": [
        {"properties": {"type": {"enum": ["text", "json_object"]}}},
        {
            "properties": {
                "json_schema": {
                    "properties": {"schema": {"type": ["object", "boolean"]}},
                    "required": ["schema"],
                    "type": "object",
                }
            },
            "required": ["json_schema"],
        },
    ]
}
_FREE: JsonDict = {"properties": {"type": {"const": "text"}}, "required": ["type"]}
ONE_GUIDE: JsonDict = {
    "anyOf": [
        {"properties": {"response_format": {"anyOf": [{"type": "null"}, _FREE]}}},
        {"properties": {"structured_outputs": {"additionalProperties": {"type": "null"}}}},
    ]
}
"""The constraint of `one_guide` as JSON Schema."""


class JsonSchemaFormat(Strict):
    """The schema of a `response_format`."""

    name: Annotated[str | None, Neutral("text", "the schema alone decides")] = None
    description: Annotated[str | None, Neutral("text", "the schema alone decides")] = None
    schema_: Schema | None = Field(
        None, alias="schema", description="The JSON Schema that the text follows."
    )
    strict: Annotated[
        bool | None, Neutral("true or false", "the text always follows the schema")
    ] = None


class ResponseFormat(Strict):
    """The form of the text: free, a JSON object, or JSON that follows a schema."""

    model_config = ConfigDict(json_schema_extra=_NEEDS_SCHEMA)

    type: Literal["text", "json_object", "json_schema"] = Field(description="Form of the text.")
    json_schema: JsonSchemaFormat | None = Field(
        None, description="The schema; required with `json_schema`."
    )

    def guide(self) -> GuideSpec | None:
        """Returns the guide of the format; None for free text.

        Raises:
            APIError: the schema is missing, or is too large.
        """
        if self.type == "text":
            return None
        if self.type == "json_object":
            return GuideSpec(json_object=True)
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise APIError(
                400,
                "response_format of type json_schema needs a schema; send it as json_schema.schema",
                param="response_format.json_schema.schema",
                code="missing_required_parameter",
            )
        return guide_spec({"json_schema": self.json_schema.schema_}, "response_format")


class StructuredOutputs(Strict):
    """vLLM's options to restrict the text; at most one of them."""

    model_config = ConfigDict(
        json_schema_extra=only_one("json", "regex", "choice", "grammar", "json_object")
    )

    json_: Schema | str | None = Field(
        None, alias="json", description="The JSON Schema that the text follows."
    )
    regex: Pattern | None = Field(None, description="The regular expression that the text matches.")
    choice: Annotated[list[Choice], Field(min_length=1, max_length=MAX_CHOICES)] | None = Field(
        None, description="The texts, one of which is the answer."
    )
    grammar: Pattern | None = Field(
        None, description="The grammar of the text, in Lark's or llama.cpp's (GBNF) notation."
    )
    json_object: bool | None = Field(None, description="Whether the text is a JSON object.")

    def guide(self) -> GuideSpec | None:
        """Returns the guide of the options; None if none of them is given.

        Raises:
            APIError: several are given, or one is malformed.
        """
        given: JsonObject = {
            "json_schema": _parsed(self.json_),
            "regex": self.regex,
            "choice": None if self.choice is None else tuple(self.choice),
            "grammar": self.grammar,
            "json_object": self.json_object or None,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return guide_spec(given, "structured_outputs") if given else None


def one_guide(
    form: ResponseFormat | None, structured: StructuredOutputs | None
) -> tuple[GuideSpec | None, str]:
    """Returns the guide of a request, None if its text is free, and the field that gives it.

    Raises:
        APIError: a schema is malformed, or two forms are given.
    """
    given = {
        name: guide
        for name, options in (("response_format", form), ("structured_outputs", structured))
        if options is not None and (guide := options.guide()) is not None
    }
    if len(given) > 1:
        message = "give response_format or structured_outputs, not both"
        raise APIError(400, message, param="structured_outputs", code="invalid_value")
    return next(((guide, name) for name, guide in given.items()), (None, "response_format"))


def _parsed(schema: JsonObject | bool | str | None) -> JsonObject | bool | None:
    """Returns a schema that may be given as JSON text."""
    if not isinstance(schema, str):
        return schema
    try:
        value = json.loads(schema)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict | bool):
        raise APIError(
            400,
            "structured_outputs.json is not the JSON text of a schema; send the schema itself",
            param="structured_outputs.json",
            code="invalid_value",
        )
    return value


def guide_spec(values: JsonObject, param: str) -> GuideSpec:
    """Returns the guide of a request.

    Raises:
        APIError: the values are malformed; the error names the field `param`.
    """
    try:
        return validate(GuideSpec, values, source=param)
    except ConfigError as error:
        raise APIError(400, str(error), param=param, code="invalid_value") from None
