"""The configuration of a model, from a source or a published size; no weights are read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from easyllm.core.errors import CheckpointError, EasyllmError, SourceError, suggest
from easyllm.models.families import FAMILIES
from easyllm.models.hf_config import CONFIG_FILE, read_config, read_files
from easyllm.models.load import open_source
from easyllm.models.sources import HUB_PREFIX, KNOWN_MODELS, hub_file
from easyllm.nn.config import ModelConfig


def published_sizes() -> dict[str, dict[str, Any]]:
    """`config.json` values of the families' published models by name (`llama2-7b`)."""
    return {name: values for family in FAMILIES.values() for name, values in family.sizes.items()}


def describe(source: str) -> ModelConfig:
    """The configuration a source or a size's name stands for.

    Args:
        source: as `load_model` takes it (of a folder the `config.json` is enough, of `hf:org/name` nothing else is
            fetched), the name of a published size, or a `config.json`.

    Raises:
        SourceError: there is no such model; the message names the nearest.
        CheckpointError: a file is damaged, or describes no model we know.

    Example:
        >>> describe("llama2-7b").num_layers
        32
    """
    sizes, path = published_sizes(), Path(source).expanduser()
    if source in KNOWN_MODELS:
        return open_source(source).config
    if source in sizes:
        return _read(sizes[source], source)
    if source.startswith(HUB_PREFIX):
        return _read(_json(hub_file(source.removeprefix(HUB_PREFIX), CONFIG_FILE)), source)
    if path.is_dir() and (path / CONFIG_FILE).is_file():
        return _read(read_files(path), source)
    if path.is_file() and path.suffix == ".json":
        return _read(_json(path), source)
    if path.exists() or path.suffix == ".gguf" or "/" in source:
        return open_source(source).config
    known = [*KNOWN_MODELS, *sizes]
    raise SourceError(
        f"model {source!r} is not known{suggest(source, known)}; known are {', '.join(known)}; or name a folder, a "
        ".gguf file, a config.json or hf:org/name"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); name a config.json") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object; name a config.json")
    return values


def _read(values: Mapping[str, Any], source: str) -> ModelConfig:
    try:
        return read_config(values)
    except EasyllmError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise CheckpointError(
            f"the values in {source!r} describe no model ({reason}); check them"
        ) from None
