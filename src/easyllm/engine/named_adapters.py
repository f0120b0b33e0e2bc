"""Attaching adapters by name to a model, also while an engine serves it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from easyllm.core.errors import ConfigError
from easyllm.core.paths import expanded
from easyllm.engine.engine import Engine
from easyllm.nn.decoder import Decoder

if TYPE_CHECKING:
    from easyllm.adapters.peft_format import AdapterFile


def read_named(adapters: Mapping[str, str | Path]) -> dict[str, "AdapterFile"]:
    """Reads adapters from folders in peft's format.

    Args:
        adapters: the folders by name.

    Raises:
        CheckpointError: a folder contains no adapter, or a damaged one.
        ConfigError: a name is empty.
    """
    if not adapters:
        return {}
    from easyllm.adapters import read_adapter

    if "" in adapters:
        raise ConfigError("an adapter needs a name, by which requests select it")
    return {name: read_adapter(expanded(folder)) for name, folder in adapters.items()}


def attach_named(model: Decoder, adapters: Mapping[str, "AdapterFile"]) -> list[str]:
    """Attaches adapters to a model; on an error, none of them.

    Args:
        model: the model, changed in place.
        adapters: what was read from their folders, by name.

    Returns:
        Their names.

    Raises:
        CheckpointError: an adapter is for another model.
        ConfigError: a name is taken, or an adapter cannot be attached by name.
    """
    if not adapters:
        return []
    from easyllm.models.adapter_files import add_adapter

    added: list[str] = []
    try:
        for name, file in adapters.items():
            add_adapter(model, file, name=name)
            added.append(name)
    except BaseException:
        detach_named(model, added)
        raise
    return added


def detach_named(model: Decoder, names: Sequence[str]) -> None:
    """Removes adapters from a model.

    Raises:
        ConfigError: no adapter has one of the names.
    """
    if names:
        from easyllm.adapters import detach

        for name in names:
            detach(model, name)


def load_served(engine: Engine, name: str, folder: str | Path) -> None:
    """Attaches an adapter to the model of an engine; nothing changes on an error.

    Raises:
        CheckpointError, ConfigError: as for `read_named` and `attach_named`; or the engine cannot
            serve the adapter.
    """
    attach_named(engine.model, read_named({name: folder}))
    try:
        engine.adapters_changed()
    except BaseException:
        detach_named(engine.model, [name])
        engine.adapters_changed()
        raise


def unload_served(engine: Engine, name: str) -> None:
    """Removes an adapter from the model of an engine, which ends the adapter's requests.

    Raises:
        ConfigError: no adapter has this name.
    """
    if not name:
        raise ConfigError("an adapter without a name cannot be unloaded; name the adapter")
    detach_named(engine.model, [name])
    engine.adapters_changed()


__all__ = ["attach_named", "detach_named", "load_served", "read_named", "unload_served"]
