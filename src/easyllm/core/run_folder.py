"""Run folders, each with one configuration in `recipe.yaml`; the folder of the shipped recipes."""

from collections.abc import Collection
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from easyllm.core.atomic import check_writable, output_errors, write_atomic
from easyllm.core.config import dump_yaml, first_difference
from easyllm.core.errors import OutputError
from easyllm.core.json_types import Json

RECIPE_FILE = "recipe.yaml"


def recipes_folder() -> Path:
    """Returns the folder of the shipped recipes: inside a wheel, or next to `src` in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


def claim_run_folder(folder: Path, config: BaseModel, *, ignore: Collection[str] = ()) -> None:
    """Claims `folder` for a run with this configuration by writing its `recipe.yaml`.

    Args:
        ignore: keys whose values may differ from the stored ones; the new values are written.

    Raises:
        OutputError: as for `check_run_folder`.
    """
    check_run_folder(folder, config, ignore=ignore)
    if ignore or not (folder / RECIPE_FILE).is_file():
        write_atomic(folder / RECIPE_FILE, dump_yaml(config))


def check_run_folder(folder: Path, config: BaseModel, *, ignore: Collection[str] = ()) -> None:
    """Checks that a run with `config` can be started or resumed in `folder`, without writing to it.

    The location of the folder (`output`) is not compared: a run can be moved.

    Raises:
        OutputError: the folder contains another run (the message says what differs) or other
            files, or it cannot be written.
    """
    recipe = folder / RECIPE_FILE
    with output_errors(folder):
        exists = recipe.is_file()
    if exists:
        difference = first_difference(
            _comparable(_completed(recipe.read_text(encoding="utf-8"), config), ignore),
            _comparable(dump_yaml(config), ignore),
        )
        if difference:
            raise OutputError(
                f"{str(folder)!r} contains another run ({difference}); choose another folder with "
                "output=... or remove the existing run"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            f"{str(folder)!r} contains other files; choose another folder with output=..."
        )
    check_writable(folder)


def _completed(text: str, config: BaseModel) -> str:
    """The text of a recipe, possibly from an older version, with defaults for the missing keys."""
    try:
        return dump_yaml(type(config).model_validate(yaml.safe_load(text)))
    except (ValidationError, yaml.YAMLError):
        return text


def _comparable(text: str, ignore: Collection[str]) -> Json:
    values = yaml.safe_load(text)
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if key != "output" and key not in ignore}
