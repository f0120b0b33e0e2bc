"""Which command a recipe is for, told by the keys that only its kind has."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from easyllm.core.errors import ConfigError

Command = Literal["run", "train", "data build"]
KINDS: dict[str, tuple[Command, str]] = {
    "stages": ("run", "a pipeline"),
    "sources": ("data build", "a corpus recipe"),
    "data": ("train", "a training recipe"),
}
"""By the key that tells, in the order in which they are looked for."""


def command_of(values: Mapping[str, Any]) -> Command | None:
    """The command that a recipe of these values is for; None where no key tells."""
    return next((command for key, (command, _) in KINDS.items() if key in values), None)


def refuse_other_kinds(values: Mapping[str, Any], path: Path, command: Command) -> None:
    """
    Raises:
        ConfigError: the file's values are those of a recipe for another command.
    """
    found = command_of(values)
    if found is not None and found != command:
        what = dict(KINDS.values())
        raise ConfigError(
            f"{path} is {what[found]}, not {what[command]}; use: easyllm {found} {path}"
        )


__all__ = ["command_of", "refuse_other_kinds"]
