"""Detection of the command that a recipe is for, from keys that only one kind of recipe has."""

from pathlib import Path
from typing import Literal

from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonMapping

Command = Literal["run", "train", "data build"]
KINDS: dict[str, tuple[Command, str]] = {
    "stages": ("run", "a pipeline"),
    "sources": ("data build", "a corpus recipe"),
    "data": ("train", "a training recipe"),
}
"""Command and description by the key that identifies them, in the order of the search."""


def command_of(values: JsonMapping) -> Command | None:
    """Returns the command that a recipe with these values is for; None if no key identifies it."""
    return next((command for key, (command, _) in KINDS.items() if key in values), None)


def check_recipe_kind(values: JsonMapping, path: Path, command: Command) -> None:
    """Checks that a recipe is not one for another command.

    Args:
        values: the content of the recipe.
        path: the file of the recipe, for the error message.
        command: the command that is to use the recipe.

    Raises:
        ConfigError: the recipe is for another command.
    """
    found = command_of(values)
    if found is not None and found != command:
        what = dict(KINDS.values())
        raise ConfigError(
            f"{path} is {what[found]}, not {what[command]}; use: easyllm {found} {path}"
        )


__all__ = ["check_recipe_kind", "command_of"]
