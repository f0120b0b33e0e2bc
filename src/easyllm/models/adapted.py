"""Models given as an adapter: the folder of an adapter names its base in `adapter_config.json`."""

import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from easyllm.core.errors import ConfigError, SourceError
from easyllm.core.paths import expanded
from easyllm.models.hf_config import CONFIG_FILE, read_end_ids, with_end_ids
from easyllm.models.load import load_model
from easyllm.models.sources import HUB_PREFIX, KNOWN_MODELS
from easyllm.nn.decoder import Decoder

if TYPE_CHECKING:
    from easyllm.adapters.peft_format import AdapterFile

ADAPTER_FILE = "adapter_config.json"
"""The file that makes a folder an adapter. Whether there is one is asked for every model, so that
the methods of adapters are imported only if there is."""


def is_adapter(source: str | Path) -> bool:
    """Returns whether a source is the folder of an adapter, without a model in it."""
    folder = expanded(source)
    return (folder / ADAPTER_FILE).is_file() and not (folder / CONFIG_FILE).is_file()


def split_adapter(
    source: str | Path, adapter: str | Path | None = None
) -> tuple[str | Path, Path | None]:
    """Returns the base model's source and the adapter's folder, if there is one.

    Args:
        source: a model, or the folder of an adapter.
        adapter: the folder of an adapter to use with the model `source`.

    Raises:
        SourceError: both arguments are adapters, or the base model cannot be found.
        CheckpointError: there is no such adapter, or a file of it is damaged.
    """
    base, folder = _split(source, adapter)
    if folder is not None:
        from easyllm.models.adapter_files import check_adapter  # imports all methods of adapters

        check_adapter(folder)
    return base, folder


def open_adapted(
    source: str | Path, adapter: str | Path | None = None
) -> tuple[str | Path, "AdapterFile | None"]:
    """Returns the base model's source and the adapter read from its folder, if there is one.

    Args:
        source, adapter: as for `split_adapter`.

    Raises:
        SourceError: as for `split_adapter`.
        CheckpointError: there is no such adapter, or its files are damaged or hold NaN.
    """
    base, folder = _split(source, adapter)
    if folder is None:
        return base, None
    from easyllm.adapters import read_adapter  # imports all methods of adapters

    return base, read_adapter(folder)


def _split(source: str | Path, adapter: str | Path | None) -> tuple[str | Path, Path | None]:
    """Returns the base model's source and the adapter's folder, without looking at its files."""
    if not is_adapter(source):
        return source, None if adapter is None else expanded(adapter)
    if adapter is not None:
        raise SourceError(
            f"{str(source)!r} is an adapter and so is {str(adapter)!r}; give the base model and "
            "one adapter"
        )
    folder = expanded(source)
    return base_of(folder), folder


def base_of(folder: Path) -> str:
    """Returns the source of the model that an adapter was trained on.

    A path in the configuration is relative to the working directory, as it was in training. A name
    such as `org/name` that is not a path is a model on the Hugging Face Hub, as `peft` writes it.

    Raises:
        SourceError: the configuration names no base model, or one that does not exist.
        CheckpointError: the configuration is missing, or not a JSON object.
    """
    from easyllm.adapters.peft_format import read_description

    base = read_description(folder).get("base_model_name_or_path")
    if isinstance(base, str) and base:
        local = expanded(base)
        if base in KNOWN_MODELS or base.startswith(HUB_PREFIX) or local.exists():
            return base
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) and not local.parent.exists():
            return HUB_PREFIX + base
    if base is None or base == "":
        raise SourceError(
            f"the adapter {str(folder)!r} does not name its base model (base_model_name_or_path is "
            f"{base!r}); give the base model and --adapter {folder}"
        )
    raise SourceError(
        f"the base model of the adapter {str(folder)!r} is {base!r}, which does not exist here; "
        f"give the base model and --adapter {folder}"
    )


def apply_adapter(model: Decoder, file: "AdapterFile") -> Decoder:
    """Applies an adapter to every sequence of a model, with the end tokens it was trained on.

    Full-precision weights are merged with the adapter, so that the model is as fast as its base;
    quantized weights, and methods that cannot be merged, keep the adapter attached.

    Args:
        model: the base model; modified in place.
        file: the adapter (`open_adapted`).

    Raises:
        CheckpointError: the adapter is for another model.
        ConfigError: the method does not support the storage of the weights.
    """
    from easyllm.adapters import merge
    from easyllm.models.adapter_files import add_adapter

    add_adapter(model, file)
    model.config = with_end_ids(model.config, read_end_ids(file.folder))
    with suppress(ConfigError):  # quantized weights, or a method without a merged form
        merge(model)
    return model


def load_adapted(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    adapter: str | Path | None = None,
) -> Decoder:
    """Loads a model, or an adapter with its base, for inference.

    Args:
        source: as for `load_model`, or the folder of an adapter.
        dtype, device: as for `load_model`.
        adapter: the folder of an adapter to use with the model `source`.

    Raises:
        SourceError, CheckpointError: as for `load_model` and `split_adapter`.
    """
    base, file = open_adapted(source, adapter)
    model = load_model(base, dtype=dtype, device=device)
    return model if file is None else apply_adapter(model, file)


__all__ = [
    "apply_adapter",
    "base_of",
    "is_adapter",
    "load_adapted",
    "open_adapted",
    "split_adapter",
]
