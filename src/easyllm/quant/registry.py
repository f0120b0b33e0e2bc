"""The formats a weight can be kept in, by name; to add one, register a `StorageFormat`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from easyllm.core.errors import CheckpointError, ConfigError, suggest
from easyllm.nn.storage import PackedStorage, WeightStorage

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageFormat:
    """A format of weights [N, K].

    Attributes:
        name: as a storage's `format` says it, `--quantize` asks for it, and `quantization_config.quant_method` of a
            checkpoint names it.
        num_bytes: of a weight of this shape.
        quantize: a full weight, and its name for errors, as a storage; None for a format that is only read from files.
        table: the format of embedding and head where a model is quantized in this one; None keeps them full.
        file_tensors: what a checkpoint holds of each weight, by the last part of the tensors' names; empty for a format
            that is made on loading and never written.
        from_file: these tensors, the weight's shape and the dtype of activations → the storage; raises `CheckpointError`
            where they do not fit.
        file_config: what `quantization_config` holds besides `quant_method`; a reader refuses other values.
        unsupported_reason: why a weight of some shape cannot be kept so; None if it can.
    """

    name: str
    num_bytes: Callable[[Shape], int]
    quantize: Callable[[Tensor, str], WeightStorage] | None = None
    table: str | None = None
    file_tensors: tuple[str, ...] = ()
    from_file: Callable[[Mapping[str, Tensor], Shape, torch.dtype], PackedStorage] | None = None
    file_config: Mapping[str, Any] = field(default_factory=dict)
    unsupported_reason: Callable[[Shape], str | None] = lambda _shape: None


FORMATS: dict[str, StorageFormat] = {}


def register_storage(format: StorageFormat) -> StorageFormat:
    """Makes a format known to loading, quantizing, saving and planning.

    Raises:
        ValueError: its name is taken, or it is read from files without a way to.
    """
    if format.name in FORMATS or format.name == "dense":
        raise ValueError(f"a storage format called {format.name!r} is registered already")
    if bool(format.file_tensors) != (format.from_file is not None):
        raise ValueError(
            f"format {format.name!r} needs both file_tensors and from_file, or neither"
        )
    FORMATS[format.name] = format
    return format


def schemes() -> list[str]:
    """Names of the formats a full model can be quantized to."""
    return [name for name, format in FORMATS.items() if format.quantize is not None]


def find_scheme(name: str) -> StorageFormat:
    """The format a model is to be quantized to.

    Raises:
        ConfigError: there is none of that name.
    """
    known = schemes()
    if name not in known:
        raise ConfigError(
            f"quantization {name!r} is not known{suggest(name, known)}; use {' or '.join(known)}"
        )
    return FORMATS[name]


def format_of_checkpoint(config: Any) -> StorageFormat | None:
    """The format that a `quantization_config` names; None where there is no such configuration.

    Raises:
        CheckpointError: it is not known, or has values that the format is not read with.
    """
    if config is None:
        return None
    if not isinstance(config, Mapping):
        config = {"quant_method": config}
    readable = [name for name, format in FORMATS.items() if format.file_tensors]
    name = config.get("quant_method")
    if name not in readable:
        known = f"known are {', '.join(readable)}" if readable else "none is read so far"
        raise CheckpointError(
            f"config.json says that the weights are quantized as {name!r}, which is not read ({known}); take the "
            "checkpoint with full weights"
        )
    format = FORMATS[str(name)]
    for key, value in config.items():
        expected = format.file_config.get(key, value if key == "quant_method" else None)
        if value != expected:
            raise CheckpointError(
                f"config.json sets quantization_config.{key}={value!r}, which {name} is not read with "
                f"(expected {expected!r})"
            )
    return format
