"""The modules that `adapter_config.json` says are adapted, by peft's rules.

`target_modules` is a regular expression, or a list of names of which a module's name must be one or
end in one after a dot; `exclude_modules` is written in the same way and takes precedence;
`layers_to_transform` limits a list to layers by number. As in peft 0.21.2, `tuners/tuners_utils.py`
(`check_target_module_exists`).
"""

import re

from easyllm.adapters.peft_keys import is_slow_pattern
from easyllm.core.json_types import Json, JsonMapping


def is_target(description: JsonMapping, name: str) -> bool:
    """Returns whether the configuration of a file says that a module is adapted.

    It is False if the configuration does not say which modules are, or in an expression that could
    take very long.

    Args:
        description: the parsed `adapter_config.json`.
        name: the module's name in the file, without peft's prefix.
    """
    targets = description.get("target_modules")
    if not _selects(targets, name) or _selects(description.get("exclude_modules"), name):
        return False
    layers = description.get("layers_to_transform")
    if layers is None or isinstance(targets, str):
        return True
    number = re.search(r"\.(\d+)\.", name)
    return number is not None and int(number[1]) in (
        layers if isinstance(layers, list) else [layers]
    )


def _selects(patterns: Json, name: str) -> bool:
    if isinstance(patterns, str):
        if is_slow_pattern(patterns):
            return False
        try:
            return re.fullmatch(patterns, name) is not None
        except re.error:
            return False
    if not isinstance(patterns, list):
        return False
    return any(name == end or name.endswith(f".{end}") for end in patterns)


__all__ = ["is_target"]
