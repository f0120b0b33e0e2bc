"""Flags for guided decoding: the form that the generated text must have."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from easyllm.cli.options import FlagGroup, Values, checked_flags
from easyllm.core.json_types import Json
from easyllm.engine.guide_spec import GuideSpec

if TYPE_CHECKING:
    from easyllm.engine import Completion


def _described(field: str, note: str = "") -> str:
    return f"{GuideSpec.model_fields[field].description} {note}".strip()


class GuideFlags(BaseModel):
    """The fields of `GuideSpec` as they are given on the command line."""

    json_schema: str | None = Field(None, description=_described("json_schema"))
    json_object: bool = Field(False, description=_described("json_object"))
    regex: str | None = Field(None, description=_described("regex"))
    choice: tuple[str, ...] = Field((), description=_described("choice"))
    grammar: str | None = Field(None, description=_described("grammar"))


GUIDE = FlagGroup(
    GuideFlags,
    *GuideFlags.model_fields,
    metavars={"json_schema": "FILE|JSON", "grammar": "FILE|TEXT"},
)


def guide_of(values: Values, *, beams: bool = False) -> GuideSpec | None:
    """Returns the guide that the flags describe; None without any.

    Args:
        values: the values of the flags.
        beams: whether beam search is used, which cannot be guided.

    Raises:
        SourceError: a value is neither an existing file nor the thing itself.
        ConfigError: several guides are given, or one is invalid or for beam search.
    """
    from easyllm.core.errors import ConfigError
    from easyllm.engine.guide_grammar import guide_grammar

    given = {n: value for n, value in values.items() if value not in (None, False, ())}
    if not given:
        return None
    if beams:
        flag = next(iter(given)).replace("_", "-")
        raise ConfigError(f"beam search cannot be guided; leave out --beams or --{flag}")
    if "json_schema" in given:
        given["json_schema"] = _schema(given["json_schema"])
    if "grammar" in given:
        given["grammar"] = _file_or(given["grammar"], "a grammar", ":" in given["grammar"])
    guide = checked_flags(GuideSpec, given, GUIDE, source="guide options")
    guide_grammar(guide)  # fails before the model is loaded
    return guide


def warn_if_cut(done: "Completion", guide: GuideSpec | None) -> None:
    """Says on standard error that a guided text is incomplete, if it is."""
    if guide is not None and done.finish_reason == "length":
        sys.stderr.write("warning: the text was cut by its maximum length; raise --max-tokens\n")


def _schema(value: str) -> Json:
    from easyllm.core.errors import ConfigError

    text = _file_or(value, "JSON", value.lstrip().startswith(("{", "true", "false")))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--json-schema is not valid JSON ({error}); correct it") from error


def _file_or(value: str, kind: str, is_text: bool) -> str:
    """Returns the text of a file, or the value itself if it `is_text` of this kind."""
    from easyllm.core.errors import SourceError

    try:
        if Path(value).is_file():
            return Path(value).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if not is_text:
            raise SourceError(f"{value[:80]!r} cannot be read: {error}; give {kind}") from error
    if not is_text:
        raise SourceError(f"there is no file {value[:80]!r}; give a file, or {kind} itself")
    return value
