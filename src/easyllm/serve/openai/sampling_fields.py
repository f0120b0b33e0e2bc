"""Fields that chat completions and completions share: how tokens are chosen and when they end.

OpenAI's own fields, and those with which vLLM extends them, under its names.
"""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, field_validator
from pydantic.config import JsonDict

from easyllm.core.json_types import Json, JsonMapping
from easyllm.engine.params import (
    MAX_COUNT,
    MAX_STOP_CHARS,
    MAX_STOPS,
    Count,
    SamplingParams,
    StopString,
)
from easyllm.serve.treatment import Strict

MAX_NEW_TOKENS = 1_000_000  # litellm asks for 128,000 if its user names none
MAX_CHOICES = 16
MAX_STOP_IDS = 64
MAX_SALT_CHARS = 256
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,8}")  # no vocabulary has more ids
_STOP_SCHEMA: JsonDict = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
OWN_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")
"""Fields whose default a model's `generation_config.json` may give."""


def whole(value: object) -> Json:
    """Converts integral floats to int: JSON does not distinguish 2.0 from 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _off(value: bool) -> bool:
    """Accepts only False; a Literal would accept 0 as well."""
    if value:
        raise ValueError("must be false")
    return value


Off = Annotated[bool, AfterValidator(_off), WithJsonSchema({"const": False})]
Penalty = Annotated[float, Field(ge=-2, le=2)]
NewTokens = Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS), BeforeValidator(whole)]
TopK = Annotated[int, Field(ge=-1, le=MAX_COUNT), BeforeValidator(whole)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63), BeforeValidator(whole)]
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES), BeforeValidator(whole)]
WholeCount = Annotated[Count, BeforeValidator(whole)]
Stops = Annotated[list[StopString], Field(max_length=MAX_STOPS)]
Bias = Annotated[dict[Count, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
STOP_FORMS: JsonDict = {
    "anyOf": [
        _STOP_SCHEMA,
        {"type": "array", "items": _STOP_SCHEMA, "maxItems": MAX_STOPS},
        {"type": "null"},
    ]
}


def as_in_engine(name: str) -> str:
    """Returns the description of a field that the engine's sampling parameters have too."""
    field = SamplingParams.model_fields[name]
    assert field.description, "every sampling parameter is described"
    if field.default in (None, {}, (), True, False):
        return field.description
    own = "that of the model's generation_config.json, or " if name in OWN_DEFAULTS else ""
    return f"{field.description} By default {own}{field.default:g}."


class SamplingFields(Strict):
    """How tokens are chosen and when a completion ends."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description=as_in_engine("temperature")
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description=as_in_engine("top_p")
    )
    top_k: TopK | None = Field(
        None, description=as_in_engine("top_k").replace("0 disables", "0 and -1 disable")
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description=as_in_engine("min_p")
    )
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description=as_in_engine("typical_p")
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = Field(
        None, description=as_in_engine("repetition_penalty")
    )
    frequency_penalty: Penalty | None = Field(None, description=as_in_engine("frequency_penalty"))
    presence_penalty: Penalty | None = Field(None, description=as_in_engine("presence_penalty"))
    logit_bias: Bias | None = Field(
        None,
        json_schema_extra={"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}},
        description=as_in_engine("logit_bias"),
    )
    seed: Seed | None = Field(None, description=as_in_engine("seed"))
    n: Choices | None = Field(None, description=as_in_engine("n"))
    stop: Stops | None = Field(
        None,
        json_schema_extra=STOP_FORMS,
        description="A stop string, or a list of them; they end the completion and are not part "
        "of it.",
    )
    stop_token_ids: Annotated[list[WholeCount], Field(max_length=MAX_STOP_IDS)] | None = Field(
        None, description=as_in_engine("stop_token_ids")
    )
    min_tokens: WholeCount | None = Field(None, description=as_in_engine("min_tokens"))
    ignore_eos: bool | None = Field(None, description=as_in_engine("ignore_eos"))
    skip_special_tokens: bool | None = Field(None, description=as_in_engine("skip_special_tokens"))
    include_stop_str_in_output: bool | None = Field(None, description=as_in_engine("include_stop"))
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARS)] | None = Field(
        None, description="Cached prefixes are shared only among requests with the same salt."
    )

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

    def sampling(self, defaults: JsonMapping | None = None, **others: Any) -> SamplingParams:
        """Returns the engine's sampling parameters.

        Args:
            defaults: the model's own defaults, which apply to the fields in `OWN_DEFAULTS`; for all
                other absent fields, OpenAI's defaults apply.
            others: parameters under other names in the request.
        """
        values: dict[str, Any] = {
            name: value for name, value in (defaults or {}).items() if name in OWN_DEFAULTS
        }
        for name in SamplingFields.model_fields.keys() & SamplingParams.model_fields.keys():
            value = getattr(self, name)
            if value is not None:
                values[name] = value
        values |= {name: value for name, value in others.items() if value is not None}
        values["top_k"] = max(values.get("top_k", 0), 0)
        if self.include_stop_str_in_output:
            values["include_stop"] = True
        for name in ("stop", "stop_token_ids"):
            if name in values:
                values[name] = tuple(values[name])
        return SamplingParams(**values)
