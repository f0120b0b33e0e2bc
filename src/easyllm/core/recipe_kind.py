"""Reading of recipes, and the command that each is for, detected from keys of only one kind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from easyllm.core.changed_kinds import overridden
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.core.run_folder import recipes_folder
from easyllm.core.yaml_text import read_yaml

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


def read_recipe(
    path: Path, model: type[BaseModel], command: Command, overrides: Sequence[str]
) -> JsonObject:
    """Returns the values of a recipe with the overrides applied, not validated yet.

    Args:
        path: the file of the recipe.
        model: the configuration class, whose fields environment variables may set.
        command: the command that is to use the recipe.
        overrides: changes to the recipe, as `key=value`.

    Raises:
        SourceError: the file does not exist.
        ConfigError: the file is not a YAML mapping or for another command, or an override is
            malformed.
    """
    written = read_yaml(path)
    _check_kind(written, path, command)
    return overridden(model, written, overrides, source=path.name)


def command_that_writes(path: Path) -> str | None:
    """Returns the command whose shipped recipe writes `path`; None if no recipe does.

    A recipe writes what is in its output folder.
    """
    for recipe in sorted(recipes_folder().glob("*.yaml")):
        values = read_yaml(recipe)
        if Path(str(values.get("output"))) in path.parents:
            return f"easyllm {command_of(values)} {recipe.stem}"
    return None


def _check_kind(values: JsonMapping, path: Path, command: Command) -> None:
    """Raises if a recipe is for another command."""
    found = command_of(values)
    if found is not None and found != command:
        what = dict(KINDS.values())
        raise ConfigError(
            f"{path} is {what[found]}, not {what[command]}; use: easyllm {found} {path}"
        )


__all__ = ["command_of", "command_that_writes", "read_recipe"]
