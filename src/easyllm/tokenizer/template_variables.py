"""Template variables that a request sets, such as `enable_thinking`: which are allowed."""

import math

from easyllm.core.errors import DataError
from easyllm.core.json_types import Json, JsonMapping, JsonObject

RESERVED = frozenset(
    [
        *("messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize"),
        *("range", "dict", "namespace", "raise_exception", "strftime_now"),
    ]
)
"""Variables and functions that a request cannot set; neither can it set the names of tokens
(`bos_token`, ...) or names that begin with an underscore."""
_MAX_DEPTH = 50
_SHOWN = 40


def checked_variables(given: JsonMapping | None, known: frozenset[str]) -> JsonObject:
    """Returns the variables of a request after checking them.

    Args:
        given: the values by name; None for no variables.
        known: the variables that the template reads.

    Raises:
        DataError: a name is reserved, or the template does not read it; or a value is not JSON.
    """
    for name, value in (given or {}).items():
        shown = repr(name)[:_SHOWN]
        if not isinstance(name, str) or not name.isidentifier():
            raise DataError(f"the template variable {shown} is not a name; give a name like 'mode'")
        if name in RESERVED or name.endswith("_token") or name.startswith("_"):
            raise DataError(
                f"the template variable {shown} is set by easyllm, not by a request; remove it"
            )
        if name not in known:
            read = ", ".join(sorted(known - RESERVED)) or "none"
            raise DataError(
                f"the model's chat template does not read the variable {shown} (it reads {read}); "
                "remove it"
            )
        if not _is_json(value):
            raise DataError(
                f"the template variable {shown} is not plain JSON; give a finite number, text, "
                "true, false, null, a list or an object"
            )
    return dict(given or {})


def _is_json(value: Json, depth: int = 0) -> bool:
    if depth > _MAX_DEPTH:
        return False
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_json(v, depth + 1) for k, v in value.items())
    if isinstance(value, list):
        return all(_is_json(item, depth + 1) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)
