"""Handling of `adapter_config.json` keys: each is honoured, known to be neutral, or rejected."""

import re
from collections.abc import Collection

from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import Json, JsonMapping

SHARED = frozenset(
    {
        *("peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version"),
        *("auto_mapping", "inference_mode", "modules_to_save"),
        # the adapted modules, which follow from the file's tensors
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    }
)
"""Keys common to all methods."""
MAX_PATTERN, MAX_QUANTIFIERS = 300, 4


def check_keys(
    description: JsonMapping,
    *,
    honoured: Collection[str],
    neutral: JsonMapping,
) -> None:
    """Rejects unsupported keys that would change the result.

    Args:
        description: the parsed `adapter_config.json`.
        honoured: keys that the method reads.
        neutral: keys that may be ignored if they have this value, one of these values (a tuple), or
            any value (None).

    Raises:
        CheckpointError: a key is not supported; the message has its value and the accepted ones.
    """
    for key, value in description.items():
        if key in SHARED or key in honoured or value is None:
            continue
        if key in neutral:
            allowed = neutral[key]
            values = allowed if isinstance(allowed, tuple) else (allowed,)
            if allowed is None or any(value is v or value == v for v in values):
                continue
            expected = " or ".join(repr(v) for v in values)
            raise CheckpointError(
                f"the adapter's configuration sets {key}={value!r}, which is not implemented "
                f"(expected {expected})"
            )
        if value is False or value == {} or value == []:
            continue  # a feature of a newer peft version, switched off
        raise CheckpointError(
            f"the adapter's configuration sets {key}={value!r}, which is not known and may change "
            "the result; remove the key if it does not"
        )


def matches(patterns: Json, name: str) -> list[Json]:
    """Returns the values of all patterns that match a module's name, in the dictionary's order.

    As in peft, a pattern must match from the beginning of the name, or from after a dot, to its
    end. peft uses the first match in dictionary order but writes dictionaries sorted by key
    (0.21.2, `config.py`), so if several match, the file does not tell which was used in training.

    Raises:
        CheckpointError: a pattern is not a valid regular expression, or could take very long.
    """
    return [v for pattern, v in (patterns or {}).items() if _compiled(str(pattern)).match(name)]


def is_slow_pattern(pattern: str) -> bool:
    """Returns whether matching a pattern could take very long (catastrophic backtracking).

    Files are untrusted input.
    """
    repeats = re.search(r"\)[*+?{]", pattern) is not None
    return (
        repeats
        or len(pattern) > MAX_PATTERN
        or len(re.findall(r"[*+{]", pattern)) > (MAX_QUANTIFIERS)
    )


def _compiled(pattern: str) -> re.Pattern[str]:
    if is_slow_pattern(pattern):
        raise CheckpointError(
            f"the adapter's pattern {pattern[:60]!r} repeats groups or is too long; "
            "write the modules' names instead"
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise CheckpointError(
            f"the adapter's pattern {pattern!r} is not a regular expression ({error}); "
            "copy the adapter again"
        ) from None
