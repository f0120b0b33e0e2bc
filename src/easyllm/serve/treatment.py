"""How each field of a request is treated: honoured, accepted where it changes nothing, or refused by name.

A request's model holds every field of the published schema. A field without a mark is honoured; the marks below stand
in the field's annotation. `null` is the same as leaving an optional field out.
"""

from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails

from easyllm.core.errors import suggest
from easyllm.serve.errors import APIError


@dataclass(frozen=True, slots=True)
class Neutral:
    """A field that is accepted at values which leave the answer as it is.

    Attributes:
        accepts: those values, in words.
        reason: why no other is.
    """

    accepts: str
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that is refused with any value; its type is None."""

    reason: str


class Strict(BaseModel):
    """Unknown fields are refused unless they are null, which says nothing; no value is converted: `"true"` is not a
    boolean, nor is 1."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_unknown_nulls(cls, value: Any) -> Any:
        """Clients write null for options they do not use, and send answers of other servers back."""
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
    """The mark of a model's field; None where it is honoured."""
    marks = (m for m in model.model_fields[name].metadata if isinstance(m, Neutral | Refused))
    return next(marks, None)


def as_api_error(error: ValidationError, model: type[BaseModel]) -> APIError:
    """The first mistake of a request: its field's path, what was wrong, and OpenAI's code for that."""
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
    """Message and code of a mistake."""
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


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field's type is made of, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
