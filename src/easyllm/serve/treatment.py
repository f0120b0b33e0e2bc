"""How each request field is treated: honoured, accepted without effect, or rejected by name.

A request model declares every field of the published schema. A field without a marker is honoured;
the other fields carry one of the markers below in their annotation. `null` is equivalent to
omitting an optional field.
"""

from dataclasses import dataclass
from typing import TypeVar, get_args

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails

from easyllm.core.errors import suggest
from easyllm.core.json_types import Json, JsonObject
from easyllm.serve.errors import APIError

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Neutral:
    """Marks a field that is accepted only at values that do not change the completion.

    Attributes:
        accepts: the accepted values, in words.
        reason: why no other value is accepted.
    """

    accepts: str
    reason: str

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Returns the schema of the field with a description made from the marker."""
        return handler(schema) | {
            "description": f"Has no effect: {self.reason}. Accepted: {self.accepts}."
        }


@dataclass(frozen=True, slots=True)
class Refused:
    """Marks a field that is rejected at any value; its type is None."""

    reason: str

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Returns the schema of the field with a description made from the marker."""
        return handler(schema) | {"description": f"Rejected: {self.reason}."}


class Strict(BaseModel):
    """A model that rejects unknown fields, unless they are null, and never converts values.

    For example, neither `"true"` nor 1 is accepted as a boolean.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_unknown_nulls(cls, value: object) -> Json:
        """Drops unknown fields that are null, as clients send for options they do not use.

        They also occur in responses of other servers that are sent back as messages.
        """
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if v is not None or k in cls.model_fields}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        found = handler(schema)
        handler.resolve_ref_schema(found)["additionalProperties"] = {"type": "null"}
        return found


def treatment_of(model: type[BaseModel], name: str) -> Neutral | Refused | None:
    """Returns the marker of a model's field; None if the field is honoured."""
    marks = (m for m in model.model_fields[name].metadata if isinstance(m, Neutral | Refused))
    return next(marks, None)


def read_as(model: type[M], body: JsonObject) -> M:
    """Validates a parsed body as a request.

    Raises:
        APIError: a field is invalid, unknown or unsupported; the error names it.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise as_api_error(error, model) from None


def as_api_error(error: ValidationError, model: type[BaseModel]) -> APIError:
    """Returns the first validation error of a request with the field's path and OpenAI's code."""
    problem = error.errors(include_url=False)[0]
    loc, mark, owner = problem["loc"], None, model
    for depth, part in enumerate(loc):
        if isinstance(part, int) or part not in owner.model_fields:
            continue
        mark = treatment_of(owner, part)
        if mark is not None:
            loc = loc[: depth + 1]
            break
        owner = _model_in(owner.model_fields[part].annotation) or owner
    message, code = _describe(problem, mark, owner)
    param = ".".join(map(str, loc))
    return APIError(
        400, f"{param}: {message}" if param else message, param=param or None, code=code
    )


def _describe(
    problem: ErrorDetails, mark: Neutral | Refused | None, owner: type[BaseModel]
) -> tuple[str, str]:
    """Returns the message and code of a validation error."""
    kind = problem["type"]
    if isinstance(mark, Refused):
        return f"this field is not supported: {mark.reason}", "unsupported_parameter"
    if isinstance(mark, Neutral):
        return f"{mark.reason}; send {mark.accepts}, or leave it out", "unsupported_value"
    if kind == "extra_forbidden":
        hint = suggest(str(problem["loc"][-1]), owner.model_fields)
        return f"this field is not supported{hint}", "unknown_parameter"
    if kind == "missing":
        return "this field is required", "missing_required_parameter"
    if kind == "model_type":
        return "Input should be a valid object", "invalid_type"
    message = problem["msg"].removeprefix("Value error, ")
    return message, "invalid_type" if kind.endswith("_type") else "invalid_value"


def _model_in(annotation: object) -> type[BaseModel] | None:
    """Returns the model that a field's type refers to, if any."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
