"""Run folders, each with one configuration in `recipe.yaml`; the folder of the shipped recipes."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from easyllm.core.atomic import check_writable, output_errors, write_atomic
from easyllm.core.config import first_difference
from easyllm.core.errors import OutputError
from easyllm.core.folder_lock import LOCK_FILE, check_unlocked, locked_folder
from easyllm.core.json_types import Json
from easyllm.core.yaml_text import dump_yaml, parse_yaml

RECIPE_FILE = "recipe.yaml"


def recipes_folder() -> Path:
    """Returns the folder of the shipped recipes: inside a wheel, or next to `src` in a checkout."""
    return _shipped("recipes")


def docs_folder() -> Path:
    """Returns the folder of the documentation: inside a wheel, or next to `src` in a checkout."""
    return _shipped("docs")


def _shipped(name: str) -> Path:
    package = Path(__file__).parents[1]
    installed = package / name
    return installed if installed.is_dir() else package.parents[1] / name


@contextmanager
def claim_run_folder(
    folder: Path, config: BaseModel, *, ignore: Collection[str] = ()
) -> Iterator[None]:
    """Context manager in which `folder` belongs to this process and this configuration.

    The folder is locked, and its `recipe.yaml` is written.

    Args:
        ignore: keys whose values may differ from the stored ones; the new values are written.

    Raises:
        OutputError: as for `check_run_folder`.
    """
    check_run_folder(folder, config, ignore=ignore)
    with locked_folder(folder):
        _check_contents(folder, config, ignore)  # another process may just have written to it
        if ignore or not (folder / RECIPE_FILE).is_file():
            write_atomic(folder / RECIPE_FILE, dump_yaml(config))
        yield


def check_run_folder(folder: Path, config: BaseModel, *, ignore: Collection[str] = ()) -> None:
    """Checks that a run with `config` can be started or resumed in `folder`, without writing to it.

    The location of the folder (`output`) is not compared: a run can be moved.

    Raises:
        OutputError: the folder contains another run (the message says what differs) or other
            files, another process is using it, or it cannot be written.
    """
    _check_contents(folder, config, ignore)
    check_unlocked(folder)


def _check_contents(folder: Path, config: BaseModel, ignore: Collection[str]) -> None:
    """Raises if a folder contains another run or other files, or cannot be written."""
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
    if folder.exists() and (not folder.is_dir() or _has_files(folder)):
        raise OutputError(
            f"{str(folder)!r} contains other files; choose another folder with output=..."
        )
    check_writable(folder)


def _has_files(folder: Path) -> bool:
    return any(file.name != LOCK_FILE for file in folder.iterdir())


def _completed(text: str, config: BaseModel) -> str:
    """The text of a recipe, possibly from an older version, with defaults for the missing keys."""
    try:
        return dump_yaml(type(config).model_validate(parse_yaml(text)))
    except (ValidationError, yaml.YAMLError):
        return text


def _comparable(text: str, ignore: Collection[str]) -> Json:
    values = parse_yaml(text)
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if key != "output" and key not in ignore}
