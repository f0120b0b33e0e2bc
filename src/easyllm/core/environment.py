"""`EASYLLM_*` variables that set keys of a recipe, such as `EASYLLM_SEED=1`."""

import difflib
import os
from collections.abc import Iterator, Mapping

from pydantic import BaseModel

ENVIRONMENT_PREFIX = "EASYLLM_"
"""`EASYLLM_OPTIMIZER__LEARNING_RATE=1e-4` sets `optimizer.learning_rate`: `__` stands for a dot."""
RESERVED_VARIABLES = frozenset(
    {
        "EASYLLM_CACHE",
        "EASYLLM_WEIGHT_CACHE_GB",
        "EASYLLM_DEBUG",
        "EASYLLM_API_KEY",
        "EASYLLM_KERNELS",
    }
)
NEAR = 0.8
"""Similarity from which a variable is taken for a misspelled one."""


def environment_overrides(
    model: type[BaseModel], environment: Mapping[str, str] | None = None
) -> list[str]:
    """Returns overrides `key.sub=value` for the `EASYLLM_*` variables that name a field of `model`.

    Args:
        environment: the variables; by default those of the process.
    """
    return [
        f"{key}={value}"
        for key, value in _keys(environment)
        if key.split(".")[0] in model.model_fields
    ]


def misspelled_variables(
    model: type[BaseModel], environment: Mapping[str, str] | None = None
) -> list[str]:
    """Returns a message for each `EASYLLM_*` variable that almost names a field of `model`.

    Other variables may be meant for other recipes, and are not mentioned.
    """
    found = []
    for key, _ in _keys(environment):
        top, dot, rest = key.partition(".")
        close = difflib.get_close_matches(top, model.model_fields, n=1, cutoff=NEAR)
        if close and close[0] != top:
            given, meant = _variable(key), _variable(f"{close[0]}{dot}{rest}")
            found.append(f"{given} is not used, as it names no key; did you mean {meant}?")
    return found


def _variable(key: str) -> str:
    return ENVIRONMENT_PREFIX + key.upper().replace(".", "__")


def _keys(environment: Mapping[str, str] | None) -> Iterator[tuple[str, str]]:
    """Yields the keys that the variables name, and their values."""
    environment = os.environ if environment is None else environment
    for name, value in sorted(environment.items()):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in RESERVED_VARIABLES:
            yield name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", "."), value


__all__ = ["ENVIRONMENT_PREFIX", "environment_overrides", "misspelled_variables"]
