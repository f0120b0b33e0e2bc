"""Adapters on disk in peft's format: `adapter_config.json` and `adapter_model.safetensors`."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from easyllm.adapters.adapter import AdapterConfig
from easyllm.adapters.adapter_set import AdapterSet
from easyllm.adapters.attach import adapter_of, detach, place
from easyllm.adapters.base_fingerprint import (
    FINGERPRINT_FILE,
    differing,
    fingerprint,
    read_fingerprint,
)
from easyllm.adapters.base_settings import BaseSettings, read_settings, write_settings
from easyllm.adapters.file_module import FileModule
from easyllm.adapters.peft_experts import fuse_experts, is_plain_lora, split_experts
from easyllm.adapters.peft_targets import is_target
from easyllm.adapters.peft_values import check_values
from easyllm.adapters.peft_whole import (
    BaseOfFile,
    FileNames,
    base_of_file,
    check_named,
    file_name,
    has_own_head,
    missing_biases,
    saved_tensors,
)
from easyllm.adapters.registry import AdapterKind, kind_of, kind_of_file
from easyllm.checkpoint.store import read_object, read_tensors, write_tensors
from easyllm.core.atomic import atomic_directory, write_json
from easyllm.core.config import first_problem
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.core.finite import all_finite
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Linear

logger = logging.getLogger(__name__)
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = {"linear": "base_model.model.", "model": "base_model."}
"""peft's prefix of tensor names, by the level of the method: only methods on linears wrap the model
in one more module."""


def save_adapter(
    model: Decoder,
    folder: Path,
    *,
    module_name: FileNames,
    base: str,
    name: str = "",
    replace: bool = False,
) -> Path:
    """Writes an adapter of the model to a folder, readable by `load_adapter`.

    `peft` can read it too if it implements the method.

    Args:
        model: the model that the adapter is attached to.
        folder: the folder to write.
        module_name: maps our module names to Hugging Face's (`models.hf_module_name(model)`).
        base: the base model's source, recorded in the configuration.
        name: the adapter's name; empty for the unnamed one.
        replace: whether to overwrite an existing folder.

    Returns:
        `folder`.

    Raises:
        ConfigError: the model has no such adapter.
        OutputError: the folder is not empty, or cannot be written.
    """
    adapters = adapter_of(model, name)
    modules = {ours: module_name(ours) for ours in adapters.adapted}
    description: JsonObject = {
        "peft_type": kind_of(adapters.config).peft_type,
        "task_type": "CAUSAL_LM" if model.config.num_labels is None else "SEQ_CLS",
        "base_model_name_or_path": base,
        "inference_mode": True,
        **adapters.config.base_to_peft(model.config),
        **adapters.to_peft(modules),
    }
    targets = {n: theirs for n, theirs in modules.items() if adapters.config.adapts(n)}
    if targets:
        description.setdefault("target_modules", _targets(model, targets, module_name))
    tensors = {
        f"{modules[ours]}.{ending}": tensor.detach().contiguous()
        for ours, (_, adapter) in adapters.adapted.items()
        for ending, tensor in adapter.saved_tensors().items()
    }
    if is_plain_lora(description):
        description, tensors = fuse_experts(
            model, module_name, description, tensors, targets.values()
        )
    elif any(".experts." in name for name in targets):
        logger.warning(
            "peft cannot read an adapter of kind %s of experts; it implements LoRA alone for them",
            adapters.config.kind,
        )
    whole, modules_to_save = saved_tensors(model, adapters, module_name)
    tensors |= whole
    if modules_to_save:
        description["modules_to_save"] = modules_to_save
    if not adapters.config.saves_modules:
        description["parameters"] = sorted(whole)
    own, prefix = adapters.own_tensors(), _PREFIX[adapters.config.level]
    tensors |= {tensor_name: parameter.detach() for tensor_name, parameter in own.items()}
    prefixed = {n if n in own else f"{prefix}{n}": tensor for n, tensor in tensors.items()}
    with atomic_directory(folder, replace=replace) as work:
        write_tensors(work / WEIGHTS, prefixed, {"format": "pt"})
        write_json(work / CONFIG, description)
        hashes = fingerprint(model, without=adapters.base_parameters)
        write_json(work / FINGERPRINT_FILE, dict(hashes))
        write_settings(work, model)
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """The contents of an adapter folder, not yet attached to a model.

    Attributes:
        folder: the folder it was read from.
        kind: the registered method.
        description: the parsed `adapter_config.json`.
        tensors: its tensors, by name without peft's prefix.
        base_fingerprint: hashes of some parameters of its base, if the file records any.
        base_settings: settings of its base in training, if the file records any.
    """

    folder: Path
    kind: AdapterKind
    description: JsonMapping
    tensors: Mapping[str, Tensor]
    base_fingerprint: Mapping[str, str] = field(default_factory=dict)
    base_settings: BaseSettings | None = None

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """The fully trained modules listed in its configuration (see `peft_whole`)."""
        return tuple(self.description.get("modules_to_save") or ())

    def num_labels(self) -> int | None:
        """Returns the number of labels of its classification head; None if it has no such head."""
        score = self.tensors.get("score.weight")
        return None if score is None else len(score)

    def has_own_head(self, model: Decoder, module_name: FileNames) -> bool:
        """Returns whether the adapted model needs an untied head although the base's is tied."""
        return has_own_head(model, self.tensors, module_name)


def read_description(folder: Path) -> JsonObject:
    """Returns the values of a folder's `adapter_config.json`.

    Raises:
        CheckpointError: the folder contains no such file, or it is not a JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        state = "is a file" if folder.is_file() else "does not exist"
        state = f"contains no {CONFIG}" if folder.is_dir() else state
        raise CheckpointError(f"{str(folder)!r} {state}; give the folder an adapter was saved to")
    return read_object(path, "copy the adapter again")


def read_adapter(folder: Path) -> AdapterFile:
    """Reads the adapter stored in a folder.

    Raises:
        CheckpointError: the folder contains no adapter, one of an unknown method, or damaged files.
    """
    folder = Path(folder)
    description = read_description(folder)
    check_values(description, folder / CONFIG)
    kind = kind_of_file(description)
    tensors, _ = read_tensors(folder / WEIGHTS)
    for name, tensor in tensors.items():
        if tensor.ndim == 0:
            raise CheckpointError(
                f"{name} in {folder / WEIGHTS} is a single number, expected a vector or a matrix; "
                "copy the adapter again"
            )
        if not tensor.is_floating_point() or not all_finite(tensor):
            raise CheckpointError(
                f"{name} in {folder / WEIGHTS} contains NaN, Inf or integers, expected finite "
                "floating-point values; copy the adapter again, or train a new one"
            )
    prefix = _PREFIX[kind.config.level]
    short = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return AdapterFile(
        folder=folder,
        kind=kind,
        description=description,
        tensors=short,
        base_fingerprint=read_fingerprint(folder),
        base_settings=read_settings(folder),
    )


def load_adapter(
    model: Decoder,
    folder: Path | AdapterFile,
    *,
    module_name: FileNames,
    name: str = "",
    base: str = "",
) -> AdapterSet:
    """Attaches the adapter stored in a folder to a model and freezes all parameters.

    A base whose weights differ from those that the adapter was trained on is warned about.

    Args:
        model: the base model; modified in place.
        folder: the folder it was saved to, by us or by `peft`, or its contents.
        module_name: maps our module names to Hugging Face's (`models.hf_module_name(model)`).
        name: the name that sequences select the adapter by, so that several can be attached;
            without one, the adapter applies to every row.
        base: the source of `model`, for messages.

    Raises:
        CheckpointError: the folder contains no adapter, one for another model, or an unsupported
            key that would change the result.
        ConfigError: the model already has an adapter, or the method does not support the storage
            format of its weights.
    """
    file = folder if isinstance(folder, AdapterFile) else read_adapter(folder)
    if file.has_own_head(model, module_name):
        raise CheckpointError(
            f"the adapter in {str(file.folder)!r} changes only one of two tied matrices of this "
            "model, embedding and head; load it with models.add_adapter, which unties the head"
        )
    if is_plain_lora(file.description):
        file = _with_experts(model, file, module_name)
    stored = base_of_file(model, file.tensors, module_name)
    if stored.replaced and name:
        raise ConfigError(
            f"the adapter in {str(file.folder)!r} was trained with {', '.join(stored.modules)} of "
            "the base and so cannot be attached by name alongside others; load it alone"
        )
    _check_settings(model, file, name)
    check_named(model, file.modules_to_save, stored, module_name)
    config = _config(model, file, stored, module_name)
    adapters = place(model, config, base_parameters=stored.names, name=name)
    try:
        _check_fit(model, file, stored, adapters, module_name)
    except CheckpointError:
        detach(model, name)
        raise
    _warn_of_another_base(model, file, base)
    with torch.no_grad():
        for entry in stored.replaced:
            own = model.get_parameter(entry.parameter)
            adapters.replaced[entry.parameter] = own.clone()
            own.copy_(entry.turned(file.tensors[entry.name]))
        for tensor_name, parameter in _adapter_tensors(adapters, module_name).items():
            parameter.copy_(file.tensors[tensor_name])
    if file.base_settings is not None and file.base_settings.differ(model):
        adapters.undo.append(partial(BaseSettings.of(model).apply, model))
        file.base_settings.apply(model)
    model.requires_grad_(False)
    return adapters


def _with_experts(model: Decoder, file: AdapterFile, module_name: FileNames) -> AdapterFile:
    """Returns the contents of a file with a linear for each expert."""
    try:
        found = split_experts(model, module_name, file.description, file.tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{file.folder}: {error}") from None
    description, tensors = found
    return dataclasses.replace(file, description=description, tensors=tensors)


def _check_settings(model: Decoder, file: AdapterFile, name: str) -> None:
    """Checks that a model can have the settings that an adapter's base had in training.

    Raises:
        ConfigError: it cannot, or they differ and the adapter is to be one of several.
    """
    settings = file.base_settings
    if settings is None or not settings.differ(model):
        return
    if name:
        raise ConfigError(
            f"the adapter {name!r} in {str(file.folder)!r} was trained with prompt_mask="
            f"{settings.prompt_mask}, but the model has prompt_mask={model.config.prompt_mask} and "
            "cannot be used with both; load the adapter alone"
        )
    before = BaseSettings.of(model)
    settings.apply(model)
    before.apply(model)


def _warn_of_another_base(model: Decoder, file: AdapterFile, base: str) -> None:
    name = differing(model, file.base_fingerprint)
    if name is None:
        return
    logger.warning(
        "the adapter in %s was trained on %r, whose %s has other values than that of %s; results "
        "may be wrong",
        file.folder,
        file.description.get("base_model_name_or_path"),
        name,
        repr(base) if base else f"this {model.config.family} model",
    )


def _config(
    model: Decoder, file: AdapterFile, base: BaseOfFile, module_name: FileNames
) -> AdapterConfig:
    """Returns the configuration of the adapter in a file."""
    layers = {file_name(module_name, ours): ours for ours, _ in model.weight_modules()}
    of_base = base.copies | {entry.name for entry in base.replaced}
    grouped: dict[str, dict[str, Tensor]] = {}
    for tensor_name, tensor in file.tensors.items():
        parts = tensor_name.split(".")
        stems = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        stem = next((stem for stem in stems if stem in layers), None)
        if stem is not None and tensor_name not in of_base:
            grouped.setdefault(stem, {})[tensor_name.removeprefix(f"{stem}.")] = tensor
    modules = {
        layers[stem]: FileModule(name=stem, tensors=tensors) for stem, tensors in grouped.items()
    }
    strange = [name for name in file.tensors if name not in of_base]
    if not modules and strange and file.kind.config.level == "linear":
        raise CheckpointError(
            f"the adapter in {str(file.folder)!r} does not fit the model, which has no layer for "
            f"its tensors, such as {strange[0]}; use the model it was trained on"
        )
    try:
        config = file.kind.config.from_peft(file.description, modules)
        config.check_file(file.description, file.tensors, model.config)
        return config
    except CheckpointError as error:
        raise CheckpointError(f"{file.folder / CONFIG}: {error}") from None
    except ValidationError as error:
        raise CheckpointError(
            f"{file.folder / CONFIG} does not describe a valid adapter ({first_problem(error)})"
        ) from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file.folder / CONFIG} does not describe a valid adapter of kind "
            f"{file.kind.peft_type} ({error})"
        ) from None


def _check_fit(
    model: Decoder,
    file: AdapterFile,
    base: BaseOfFile,
    adapters: AdapterSet,
    module_name: FileNames,
) -> None:
    expected = {n: list(p.shape) for n, p in _adapter_tensors(adapters, module_name).items()}
    for entry in base.replaced:
        own = model.get_parameter(entry.parameter)
        expected[entry.name] = list(entry.turned(own).shape)
    missing = sorted(
        {
            *(set(expected) - set(file.tensors)),
            *_not_adapted(model, file, base, adapters, module_name),
            *missing_biases(model, adapters.config, file.tensors, module_name),
        }
    )
    left = sorted(set(file.tensors) - set(expected) - base.copies)
    wrong = [
        f"{name}: got {list(file.tensors[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in file.tensors and list(file.tensors[name].shape) != shape
    ]
    if not expected:
        left = left or ["nothing"]
    complaints = [
        f"{len(names)} {what}, such as {names[0]}"
        for what, names in (("missing", missing), ("unexpected", left), ("of wrong shape", wrong))
        if names
    ]
    if complaints:
        raise CheckpointError(
            f"the adapter in {str(file.folder)!r} does not fit the model (tensors "
            f"{'; '.join(complaints)}); use the model it was trained on"
        )


def _not_adapted(
    model: Decoder,
    file: AdapterFile,
    base: BaseOfFile,
    adapters: AdapterSet,
    module_name: FileNames,
) -> Iterator[str]:
    """Yields the targets in a file's configuration that have no tensors in the file.

    They are layers of a deeper model than the adapter's, or tensors that were lost. Experts are
    left out, which peft does not count as modules.
    """
    config = adapters.config
    for ours, layer in model.weight_modules():
        name = file_name(module_name, ours)
        if name is None or ours in adapters.adapted or ours in base.modules or ".experts." in name:
            continue
        reachable = isinstance(layer, Linear) or config.adapts_embeddings
        has_copy = any(copy.startswith(f"{name}.") for copy in base.copies)
        if reachable and not has_copy and is_target(file.description, name):
            yield name


def _adapter_tensors(adapters: AdapterSet, module_name: FileNames) -> dict[str, Tensor]:
    """Returns the adapter's tensors, by their names in the file without peft's prefix."""
    found: dict[str, Tensor] = {}
    for ours, (_, adapter) in adapters.adapted.items():
        stem = module_name(ours)
        found |= {f"{stem}.{ending}": p for ending, p in adapter.file_tensors().items()}
    return {**found, **adapters.own_tensors()}


def _targets(model: Decoder, modules: Mapping[str, str], module_name: FileNames) -> list[str]:
    """Returns peft's `target_modules`: last name parts if unambiguous, full names otherwise.

    peft adapts every module whose name ends in one of them.
    """
    every = [file_name(module_name, ours) or ours for ours, _ in model.weight_modules()]
    leaves = {theirs.rsplit(".", 1)[-1] for theirs in modules.values()}
    reached = {name for name in every if name.rsplit(".", 1)[-1] in leaves}
    return sorted(leaves) if reached == set(modules.values()) else sorted(modules.values())


__all__ = [
    "CONFIG",
    "WEIGHTS",
    "AdapterFile",
    "load_adapter",
    "read_adapter",
    "read_description",
    "save_adapter",
]
