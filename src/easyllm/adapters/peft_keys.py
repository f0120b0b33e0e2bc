"""Which keys of an `adapter_config.json` are read: every one is honoured, known to change nothing, or refused by its name."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from easyllm.core.errors import CheckpointError

SHARED = frozenset(
    {
        *("peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version"),
        *("auto_mapping", "inference_mode", "modules_to_save"),
        # which modules are adapted: the file's tensors say so themselves
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    }
)
"""Keys of every method."""
MAX_PATTERN, MAX_QUANTIFIERS = 300, 4


def check_keys(
    description: Mapping[str, Any],
    *,
    honoured: Collection[str],
    neutral: Mapping[str, Any],
) -> None:
    """Refuses keys that would change the result and are not read.

    Args:
        honoured: keys that the method reads.
        neutral: keys that are read past at a value, at one of several (a tuple), or at any (None).

    Raises:
        CheckpointError: with the key, its value and what is read instead.
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
                f"the adapter's configuration sets {key}={value!r}, which is not implemented (expected {expected})"
            )
        if value is False or value == {} or value == []:
            continue  # a newer method's key, switched off
        raise CheckpointError(
            f"the adapter's configuration sets {key}={value!r}, which is not known and may change the result; remove the "
            "key if it does not"
        )


def matches(patterns: Any, name: str) -> list[Any]:
    """The values of the patterns that fit a module's name, by peft's rule: from the name's beginning or after a dot, up to
    its end.

    peft takes the first in the order of the dictionary, and writes dictionaries sorted by key (0.21.2, `config.py`): where
    several fit, a file does not say which one counted in the training.

    Raises:
        CheckpointError: a pattern is not a regular expression, or one that could take very long.
    """
    return [v for pattern, v in (patterns or {}).items() if _compiled(str(pattern)).match(name)]


def _compiled(pattern: str) -> re.Pattern[str]:
    # a file's expression must not hang the program: no repeated groups, few repetitions
    is_slow = (
        re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > MAX_QUANTIFIERS
    )
    if len(pattern) > MAX_PATTERN or is_slow:
        raise CheckpointError(
            f"the adapter's pattern {pattern[:60]!r} repeats groups or is too long; write the modules' names instead"
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise CheckpointError(
            f"the adapter's pattern {pattern!r} is not a regular expression ({error}); copy the adapter again"
        ) from None
