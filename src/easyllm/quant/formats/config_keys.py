"""Handling of `quantization_config`: keys are honoured, known to be neutral, or rejected."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from pydantic import ValidationError

from easyllm.core.config import first_problem
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonMapping

T = TypeVar("T")


def check_config(
    config: JsonMapping, *, honoured: Collection[str], neutral: Collection[str]
) -> None:
    """Rejects keys that may change what the tensors mean.

    Args:
        config: `quantization_config`.
        honoured: keys that the format reads.
        neutral: keys of how the file was made, which do not matter to a reader.

    Raises:
        CheckpointError: another key has a value that is not null, false or empty.
    """
    for key, value in config.items():
        if key in honoured or key in neutral or key == "quant_method":
            continue
        if value is None or value is False or value == {} or value == []:
            continue  # a feature of a newer version, switched off
        raise CheckpointError(
            f"config.json sets quantization_config.{key}={value!r:.100}, which is not known and "
            "may change the result; remove the key if it does not"
        )


def expect(config: JsonMapping, name: str, allowed: Mapping[str, Sequence[object]]) -> None:
    """Rejects values of keys that are read.

    Args:
        config: `quantization_config`.
        name: the format.
        allowed: the supported values of each key; a key may be missing or null.

    Raises:
        CheckpointError: a key has another value.
    """
    for key, values in allowed.items():
        if config.get(key) is not None and config[key] not in values:
            expected = " or ".join(repr(value) for value in values)
            raise CheckpointError(
                f"config.json sets quantization_config.{key}={config[key]!r:.100}, which is not "
                f"supported for {name} (expected {expected})"
            )


def valid(make: Callable[[], T]) -> T:
    """Returns `make()`, a value built from a `quantization_config`.

    Raises:
        CheckpointError: the configuration lacks a key or has a value that is not supported.
    """
    try:
        return make()
    except KeyError as error:
        raise CheckpointError(
            f"config.json has no quantization_config.{error.args[0]}; copy the checkpoint again"
        ) from None
    except ValidationError as error:
        raise CheckpointError(
            f"config.json has a quantization_config that is not supported ({first_problem(error)})"
        ) from None


__all__ = ["check_config", "expect", "valid"]
