"""Patterns in an adapter's settings that select modules or parameters by name.

A pattern is a full name (`layers.0.mixer.q_proj`), its trailing part (`q_proj`), or either with the
wildcards of shell patterns: `*` matches any characters, dots included, `?` one character, `[0-3]`
one of a range. `layers.[0-3].mixer.*` selects everything in four mixers.
"""

import re
from collections.abc import Iterable, Sequence
from fnmatch import translate
from functools import lru_cache

from easyllm.core.errors import ConfigError, suggest

WILDCARDS = "*?["
NUMBERED = re.compile(r"(^|\.)\d+(\.|$)")
"""Matches a module name that contains a layer number."""


def name_matches(name: str, pattern: str) -> bool:
    """Returns whether a pattern selects the module or parameter with this full name."""
    if any(character in pattern for character in WILDCARDS):
        return _compiled(pattern).match(name) is not None
    return name == pattern or name.endswith(f".{pattern}")


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    # fnmatch writes atomic groups around each `*`, so matching takes linear time
    return re.compile(rf"(?:.*\.)?{translate(pattern)}")


def differs_by_layer(patterns: Iterable[str]) -> bool:
    """Returns whether a pattern may select a module in one layer but not the same in another."""
    return any(
        NUMBERED.search(pattern) or any(character in pattern for character in WILDCARDS)
        for pattern in patterns
    )


def check_patterns(
    patterns: Iterable[str], names: Sequence[str], *, key: str, what: str, hint: str = ""
) -> None:
    """Checks that each pattern selects at least one of some modules.

    Args:
        patterns: the patterns.
        names: full names of the modules.
        key: the settings' key, for the error message (`adapter.targets`).
        what: what the names are (`linear layer of this model`).
        hint: text before the list of possible names (`all-linear or `).

    Raises:
        ConfigError: a pattern selects none of them.
    """
    for pattern in patterns:
        if any(name_matches(name, pattern) for name in names):
            continue
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise ConfigError(
            f"{key} {pattern!r} matches no {what}{suggest(pattern, leaves)}; "
            f"use {hint}some of {', '.join(leaves)}"
        )


__all__ = ["NUMBERED", "check_patterns", "differs_by_layer", "name_matches"]
