"""The `--adapter` option, and models served from adapters that share their base."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from easyllm.cli.sampling import load_llm
from easyllm.core.json_types import JsonMapping

if TYPE_CHECKING:
    from easyllm.adapters.peft_format import AdapterFile
    from easyllm.engine import LLM

AdapterFolder = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="Folder of an adapter to use with the model, instead of giving its folder as MODEL.",
        metavar="FOLDER",
    ),
]


@dataclass(slots=True)
class ServedSources:
    """The models of a server.

    Attributes:
        models: the models by the name they are served under.
        adapters: the adapter that requests to a served name select.
        loaders: how the model of a served name is loaded again.
    """

    models: dict[str, "LLM"] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    loaders: dict[str, Callable[[], "LLM"]] = field(default_factory=dict)

    def add(self, names: Sequence[str], load: Callable[[], "LLM"]) -> None:
        """Loads a model that is served under several names."""
        self.models |= dict.fromkeys(names, load())
        self.loaders |= dict.fromkeys(names, load)


def load_served(
    named: Mapping[str, str], *, adapter: str | None = None, **options: Any
) -> ServedSources:
    """Loads the models of a server; adapters of the same base share one copy of its weights.

    Args:
        named: sources by the name they are served under; a source may be an adapter's folder.
        adapter: the folder of an adapter to use with the only model.
        options: options of `LLM`.

    Returns:
        The models by name, with their adapters, and how they are loaded again.

    Raises:
        ConfigError: `adapter` is given with several models; or a model cannot be loaded.
    """
    from easyllm.core.errors import ConfigError
    from easyllm.models import open_source
    from easyllm.models.adapted import open_adapted

    if adapter is not None and len(named) > 1:
        raise ConfigError(
            f"--adapter applies to one model, but {len(named)} are served; give NAME={adapter} "
            "instead, which finds its base"
        )
    parts = {name: open_adapted(source, adapter) for name, source in named.items()}
    groups: dict[Path, list[str]] = {}
    for name, (base, _) in parts.items():
        opened = open_source(base)
        opened.check(opened.skeleton())
        groups.setdefault(opened.path.resolve(), []).append(name)
    found = ServedSources()
    for names in groups.values():
        shared = _shared(names, parts, options)
        alone = [name for name in names if name not in shared]
        for name in alone:
            base, file = parts[name]
            only = None if file is None else str(file.folder)
            found.add([name], partial(load_llm, str(base), adapter=only, **options))
        if shared:
            files = {name: parts[name][1] for name in shared}
            folders = {name: file.folder for name, file in files.items() if file is not None}
            source = str(parts[shared[0]][0])
            found.add(shared, partial(load_llm, source, adapters=folders, **options))
            found.adapters |= {name: name for name in folders}
    found.models = {name: found.models[name] for name in named}
    return found


def _shared(
    names: list[str],
    parts: Mapping[str, tuple[str | Path, "AdapterFile | None"]],
    options: JsonMapping,
) -> list[str]:
    """Returns those of the models with one base that can share its weights; empty if only one.

    An adapter needs its own copy if it replaces weights of the base, adds virtual tokens to every
    sequence, or has other end tokens or another prompt mask. So do all of them with speculative
    decoding, which does not support adapters selected per request.
    """
    from easyllm.models import open_source
    from easyllm.models.hf_config import read_end_ids

    adapted = [name for name in names if parts[name][1] is not None]
    if not adapted or len(names) < 2 or options.get("draft") is not None:
        return []
    config = open_source(parts[names[0]][0]).config
    ends = set(config.eos_token_ids)
    shared = [name for name in names if parts[name][1] is None]
    for name in adapted:
        file = parts[name][1]
        assert file is not None, "`adapted` lists the models with an adapter"
        in_linears = file.kind.config.level == "linear" and not file.modules_to_save
        settings = file.base_settings
        has_mask = settings is None or settings.prompt_mask == config.prompt_mask
        if in_linears and has_mask and set(read_end_ids(file.folder)) <= ends:
            shared.append(name)
    return shared if len(shared) > 1 else []
