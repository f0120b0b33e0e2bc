"""What a guided completion must look like: a JSON schema, a regular expression, choices, a grammar.

This module loads neither torch nor llguidance, so that the command line and the server can validate
requests without them. `guided` compiles a specification to token masks.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, StrictBool, field_validator, model_validator

from easyllm.core.config import Config
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import Json

if TYPE_CHECKING:
    from easyllm.engine.params import SamplingParams

MAX_SCHEMA_BYTES = 131_072
MAX_SCHEMA_DEPTH = 64
"""Maximum nesting of lists and objects in a schema; llguidance compiles them recursively."""
MAX_REGEX_BYTES = 8_192
MAX_GRAMMAR_BYTES = 65_536
MAX_CHOICES = 4_096
MAX_CHOICE_CHARS = 4_096
MAX_CHOICES_BYTES = 131_072

GuideKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]
Choice = Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_CHARS)]


class GuideError(ConfigError):
    """A guide is invalid, or contains something that cannot be honoured exactly.

    Attributes:
        keyword: the keyword or construct that is refused; None if the error concerns the whole.
    """

    def __init__(self, message: str, *, keyword: str | None = None) -> None:
        super().__init__(message)
        self.keyword = keyword


class GuideSpec(Config):
    """The form that a completion must have; exactly one field is set.

    Tokens that would leave this form are masked out, so the model chooses among the others. A
    completion that ends by length may be cut anywhere.
    """

    json_schema: dict[str, Any] | StrictBool | None = Field(
        None,
        description="JSON Schema (draft 2020-12, or an earlier one named by `$schema`) that the "
        "completion must satisfy; a keyword that cannot be honoured is refused.",
    )
    json_object: bool = Field(False, description="The completion must be a JSON object.")
    regex: str | None = Field(
        None,
        min_length=1,
        description="Regular expression that the whole completion must match; `\\d` is 0-9, `\\w` "
        "is A-Z, a-z, 0-9 and _; lookarounds and backreferences are refused.",
    )
    choice: tuple[Choice, ...] = Field(
        (), max_length=MAX_CHOICES, description="The completion must be one of these texts."
    )
    grammar: str | None = Field(
        None,
        min_length=1,
        description="Context-free grammar of the completion: Lark with the extensions of "
        "llguidance, or GBNF, which starts with `root ::=`.",
    )

    @field_validator("json_schema")
    @classmethod
    def _bounded_schema(cls, value: Json) -> Json:
        if depth_exceeds(value, MAX_SCHEMA_DEPTH):
            raise ValueError(f"the schema is nested more than {MAX_SCHEMA_DEPTH} deep; flatten it")
        _check_size("the schema", _dump(value), MAX_SCHEMA_BYTES)
        return value

    @field_validator("regex")
    @classmethod
    def _bounded_regex(cls, value: str | None) -> str | None:
        return _check_size("the regular expression", value, MAX_REGEX_BYTES)

    @field_validator("grammar")
    @classmethod
    def _bounded_grammar(cls, value: str | None) -> str | None:
        return _check_size("the grammar", value, MAX_GRAMMAR_BYTES)

    @field_validator("choice")
    @classmethod
    def _bounded_choices(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        _check_size("the choices together", "".join(value), MAX_CHOICES_BYTES)
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> "GuideSpec":
        given = self._given()
        if len(given) != 1:
            found = f"got {', '.join(given)}" if given else "got none"
            raise ValueError(
                "set exactly one of json_schema, json_object, regex, choice and grammar; " + found
            )
        return self

    @property
    def kind(self) -> GuideKind:
        """Name of the field that is set."""
        return self._given()[0]

    @property
    def key(self) -> str:
        """SHA-256 in hexadecimal; equal for equal specifications, whose keys are in equal order.

        The order of keys counts, because a model writes the properties of an object in this order.
        """
        return hashlib.sha256(_dump(self.model_dump()).encode()).hexdigest()

    def _given(self) -> list[GuideKind]:
        values: dict[GuideKind, bool] = {
            "json_schema": self.json_schema is not None,
            "json_object": self.json_object,
            "regex": self.regex is not None,
            "choice": bool(self.choice),
            "grammar": self.grammar is not None,
        }
        return [kind for kind, is_set in values.items() if is_set]


def check_guided_params(params: "SamplingParams") -> None:
    """Refuses sampling parameters that a guided completion cannot honour.

    Raises:
        GuideError: EOS is to be ignored, although a guided completion ends with it.
    """
    if params.ignore_eos:
        raise GuideError(
            "ignore_eos continues past the EOS token, with which a guided completion ends; leave "
            "out ignore_eos or the guide",
            keyword="ignore_eos",
        ).about("ignore_eos")


def is_gbnf(grammar: str) -> bool:
    """Whether a grammar is GBNF: its first rule, after comments, is `root ::=`."""
    return re.match(r"(?:\s|#[^\n]*\n)*root\s*::=", grammar) is not None


def depth_exceeds(value: Json, limit: int) -> bool:
    """Whether lists and objects are nested more than `limit` deep; does not recurse."""
    level: list[Json] = [value]
    for _ in range(limit + 1):
        level = [inner for each in level for inner in _children(each)]
        if not level:
            return False
    return True


def _children(value: Json) -> Iterable[Json]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _dump(value: Json) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"it is not JSON ({error}); give plain JSON values") from error


def _check_size(what: str, text: str | None, limit: int) -> str | None:
    """Returns `text`; raises ValueError if it is too long or not Unicode."""
    try:
        size = len((text or "").encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} contain(s) a lone surrogate; give valid Unicode") from error
    if size > limit:
        raise ValueError(f"{what}: {size:,} bytes, but at most {limit:,} are allowed; shorten it")
    return text
