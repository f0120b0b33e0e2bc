"""Registry of weight storage formats by name; to add one, register a `StorageFormat`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import methodcaller

import torch
from torch import Tensor

from easyllm.core.errors import CheckpointError, ConfigError, suggest
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.nn.storage import PackedStorage, WeightStorage

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageFormat:
    """A storage format of weights [N, K].

    Attributes:
        name: name of the format: a storage's `format`, the value of `--quantize`, and
            `quantization_config.quant_method` in a checkpoint.
        num_bytes: returns the size in bytes of a weight of a given shape.
        quantize: (full-precision weight, its name for error messages) → quantized storage; None for
            a format that is only read from files.
        table: name of the format of embedding and head in a model quantized to this format; None
            leaves them in full precision.
        file_tensors: last name components of the tensors that a checkpoint stores for each weight;
            empty for a format that is created on loading and never written.
        optional_tensors: the same for tensors that not every file has.
        from_file: (these tensors, shape of the weight, dtype of activations) → storage; raises
            `CheckpointError` if the tensors do not match.
        file_config: expected entries of `quantization_config` in addition to `quant_method`;
            other values are refused on reading.
        layout: name of the `FileLayout` that writes the format; None for formats with
            `file_tensors`, and for those that are never written.
        from_buffers: (buffers of a storage that `quantize` returned by name, with the empty `like`;
            shape of the weight) → the same storage; None if the weight cache does not store it.
        unsupported_reason: returns why a weight of a given shape cannot be stored in this format;
            None if it can.
    """

    name: str
    num_bytes: Callable[[Shape], int]
    quantize: Callable[[Tensor, str], WeightStorage] | None = None
    table: str | None = None
    file_tensors: tuple[str, ...] = ()
    optional_tensors: tuple[str, ...] = ()
    from_file: Callable[[Mapping[str, Tensor], Shape, torch.dtype], PackedStorage] | None = None
    file_config: JsonMapping = field(default_factory=dict)
    layout: str | None = None
    from_buffers: Callable[[Mapping[str, Tensor], Shape], PackedStorage] | None = None
    unsupported_reason: Callable[[Shape], str | None] = lambda _shape: None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayout:
    """A layout of quantized weights in checkpoints, whose `quantization_config` describes the grid.

    Attributes:
        name: its `quant_method`, and the `format` of its storages or the `layout` of their format.
        format_of: `quantization_config` → the storage format that reads such a file; raises
            `CheckpointError` for values that are not supported.
        tensors_of: returns the file's tensors of a storage, by the last part of their names.
        config_of: (storages by file name of their modules, file names of the linears that are not
            quantized) → `quantization_config`; raises `CheckpointError` if no one describes them.
    """

    name: str
    format_of: Callable[[JsonMapping], StorageFormat]
    config_of: Callable[[Mapping[str, WeightStorage], Sequence[str]], JsonObject]
    tensors_of: Callable[[WeightStorage], Mapping[str, Tensor]] = methodcaller("tensors")


KEPT = "gguf"
"""The value of `quantize` that keeps the blocks of a GGUF file as they are."""
FORMATS: dict[str, StorageFormat] = {}
LAYOUTS: dict[str, FileLayout] = {}


def register_storage(format: StorageFormat) -> StorageFormat:
    """Registers a format for loading, quantizing, saving and memory planning; returns it.

    Raises:
        ValueError: the name is already registered, or only one of `file_tensors` and `from_file`
            is set.
    """
    _check_name(format.name)
    if bool(format.file_tensors) != (format.from_file is not None):
        raise ValueError(
            f"format {format.name!r} needs both file_tensors and from_file, or neither"
        )
    FORMATS[format.name] = format
    return format


def register_layout(layout: FileLayout) -> FileLayout:
    """Registers a layout for loading and saving; returns it.

    Raises:
        ValueError: the name is already registered.
    """
    _check_name(layout.name)
    LAYOUTS[layout.name] = layout
    return layout


def _check_name(name: str) -> None:
    if name in FORMATS or name in LAYOUTS or name == "dense":
        raise ValueError(f"a storage format named {name!r} is already registered")


def schemes() -> list[str]:
    """Returns the names of the formats that a full-precision model can be quantized to."""
    return [name for name, format in FORMATS.items() if format.quantize is not None]


def find_scheme(name: str) -> StorageFormat:
    """Returns the format named `name` that a model can be quantized to.

    Raises:
        ConfigError: there is no such format.
    """
    known = schemes()
    if name == KEPT:
        raise ConfigError(
            f"quantize={KEPT} keeps the blocks of a GGUF file, which is only possible while one "
            f"is loaded; use {' or '.join(known)}"
        )
    if name not in known:
        raise ConfigError(
            f"quantization {name!r} is not known{suggest(name, known)}; use {' or '.join(known)}"
        )
    return FORMATS[name]


def is_cacheable(name: str) -> bool:
    """Returns whether the weight cache stores models quantized to the format `name`.

    Raises:
        ConfigError: there is no such format.
    """
    format = find_scheme(name)
    used = [format] if format.table is None else [format, find_scheme(format.table)]
    return all(each.from_buffers is not None for each in used)


def check_scheme(name: str) -> None:
    """Checks that `quantize` can be set to `name`: a format, or the blocks of a GGUF file.

    Raises:
        ConfigError: it cannot.
    """
    if name != KEPT:
        find_scheme(name)


def format_of_checkpoint(config: object) -> StorageFormat | None:
    """Returns the format named by a checkpoint's `quantization_config`; None if that is None.

    Raises:
        CheckpointError: the format is unknown, or the configuration has unsupported values.
    """
    if config is None:
        return None
    if not isinstance(config, Mapping):
        config = {"quant_method": config}
    readable = [*LAYOUTS, *(name for name, format in FORMATS.items() if format.file_tensors)]
    name = config.get("quant_method")
    if name not in readable:
        known = f"supported: {', '.join(readable)}" if readable else "no format is supported yet"
        raise CheckpointError(
            f"config.json declares weights quantized as {name!r}, which cannot be read ({known}); "
            "use the checkpoint with unquantized weights"
        )
    if name in LAYOUTS:
        try:
            return LAYOUTS[str(name)].format_of(config)
        except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(
                f"the quantization_config in config.json cannot be read as {name} ({error}); copy "
                "the checkpoint again"
            ) from None
    format = FORMATS[str(name)]
    for key, value in config.items():
        expected = format.file_config.get(key, value if key == "quant_method" else None)
        if value != expected:
            raise CheckpointError(
                f"config.json sets quantization_config.{key}={value!r}, which is not supported for "
                f"{name} (expected {expected!r})"
            )
    return format
