"""The model of a run, ready to be trained: weights, head, adapter, dtype, optimizer."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from easyllm.adapters import AdapterSet, attach
from easyllm.core.device import bf16_is_fast
from easyllm.core.errors import ConfigError
from easyllm.core.manifest import hash_path, hash_value
from easyllm.models import load_tokenizer, open_source
from easyllm.models.load import OpenSource
from easyllm.models.scratch import ScratchConfig, build_scratch, scratch_model_config
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.recompute import recompute_activations
from easyllm.ops.cross_entropy import STEADY_ROWS
from easyllm.quant import StorageFormat
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.config import TrainConfig
from easyllm.train.loop import Arithmetic
from easyllm.train.loss_scaler import LossScaler
from easyllm.train.objectives import Objective, Reference
from easyllm.train.optim import MasterOptimizer


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the weights come from: a model's source, or nothing yet.

    Attributes:
        config: of the model.
        tokenizer: that belongs to it.
        identity: computes a hash of what the weights are made from (which reads all of a model's files).
        build: the model in a dtype, on a device.
        values: some of the parameters in fp32, by name.
        packed: the format of weights that are quantized in the source.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    identity: Callable[[], str]
    build: Callable[[torch.dtype, torch.device], Decoder]
    values: Callable[[Collection[str]], dict[str, Tensor]]
    packed: StorageFormat | None = None


def find_origin(config: TrainConfig) -> Origin:
    """Locates the model a recipe names, or plans the fresh one it describes; no weights are read.

    Raises:
        SourceError, CheckpointError: there is no such model or tokenizer.
        ConfigError: the values describe no model.
    """
    if isinstance(config.model, ScratchConfig):
        tokenizer = load_tokenizer(config.model.tokenizer)
        fresh = scratch_model_config(config.model, tokenizer)
        fresh = _with_mask(fresh, config)
        seed = config.seed

        def build(dtype: torch.dtype, device: torch.device) -> Decoder:
            return build_scratch(fresh, seed=seed).to(device, dtype)

        def values(names: Collection[str]) -> dict[str, Tensor]:
            state = build_scratch(fresh, seed=seed).state_dict()
            return {name: state[name] for name in names if name in state}

        described = [fresh.model_dump(mode="json"), seed]
        return Origin(fresh, tokenizer, lambda: hash_value(described), build, values)
    opened = open_source(config.model)
    opened = replace(opened, config=_with_mask(opened.config, config))
    identity = partial(hash_path, opened.path)
    reader = _reader(opened)
    return Origin(
        opened.config, opened.tokenizer(), identity, reader, opened.parameters, opened.packed
    )


def _reader(opened: OpenSource) -> Callable[[torch.dtype, torch.device], Decoder]:
    return lambda dtype, device: opened.model(dtype, device)


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of the weights that products run with."""
    match config.precision:
        case "bf16":
            return torch.bfloat16
        case "fp16":
            return torch.float16
        case "auto":
            return torch.bfloat16 if bf16_is_fast(device) else torch.float32
    return torch.float32


def build_arithmetic(config: TrainConfig, model: ModelConfig, device: torch.device) -> Arithmetic:
    """Autocast and loss scaling as the precision asks; numbers of tokens that suit the machine, where no router counts
    them."""
    bf16 = config.precision == "bf16_autocast" or compute_dtype(config, device) == torch.bfloat16
    steady = device.type == "cpu" and bf16 and not model.has_experts
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    if config.precision == "bf16_autocast":
        autocast = partial(torch.autocast, device.type, torch.bfloat16)
    scaler = LossScaler() if config.precision == "fp16" else None
    return Arithmetic(autocast, scaler, STEADY_ROWS if steady else 1)


@dataclass(frozen=True, slots=True)
class Trained:
    """A model, what is trained in it, and the optimizer of that.

    Attributes:
        adapters: the adapter that is trained; None where every weight is.
    """

    model: Decoder
    optimizer: MasterOptimizer
    adapters: AdapterSet | None


def build_model(
    config: TrainConfig, origin: Origin, objective: Objective, device: torch.device
) -> Trained:
    """The model with what is trained in it marked, and the optimizer of that.

    Raises:
        ConfigError: every weight is to be trained and some are quantized, or the adapter does not fit the model.
    """
    compute = compute_dtype(config, device)
    masters: dict[str, Tensor] | None = None
    adapters: AdapterSet | None = None
    if config.adapter is not None:
        model = objective.prepare_model(origin.build(compute, device), seed=config.seed)
        adapters = attach(
            model, config.adapter, seed=config.seed, also_trained=objective.also_trained
        )
        trained = adapters.trained_parameters(model)
        if (
            compute != torch.float32
        ):  # modules trained whole start from what the file has, unrounded
            masters = origin.values(adapters.whole_parameters())
    else:
        model = objective.prepare_model(origin.build(torch.float32, device), seed=config.seed)
        if packed := model.packed_formats():
            raise cannot_train_all(config, sorted(packed))
        if compute != torch.float32:
            masters = {name: p.detach() for name, p in model.named_parameters()}
        model = model.to(compute).requires_grad_(True)
        trained = dict(model.named_parameters())
    for layer in model.layers:
        layer.dropout.p = config.dropout  # type: ignore[union-attr]
    recompute_activations(model, config.checkpoint_activations)
    if config.compile:
        for layer in model.layers:
            layer.feed_forward.compile(dynamic=True)  # type: ignore[union-attr]
    optimizer = MasterOptimizer(trained, config.optimizer, config.parameter_groups, masters)
    return Trained(model, optimizer, adapters)


def cannot_train_all(config: TrainConfig, formats: Sequence[str]) -> ConfigError:
    """The answer where every weight is to be trained and some are quantized."""
    return ConfigError(
        f"the weights of {source_name(config)} are quantized ({', '.join(formats)}) and cannot all be trained; train an "
        "adapter on them (adapter.kind=lora)"
    )


def build_reference(
    config: TrainConfig, origin: Origin, objective: Objective, trained: Trained
) -> Reference:
    """The model the run starts from, frozen: the same one with its adapter passed over, where the adapter alone is trained and
    starts from the base; else a second one."""
    if trained.adapters is not None and not trained.adapters.whole:
        return Reference(trained.model, without_adapter=True)
    device = trained.model.device
    model = objective.prepare_model(
        origin.build(compute_dtype(config, device), device), seed=config.seed
    )
    return Reference(model.requires_grad_(False).eval(), without_adapter=False)


def _with_mask(config: ModelConfig, train: TrainConfig) -> ModelConfig:
    if train.prompt_mask is None:
        return config
    try:
        return config.changed(prompt_mask=train.prompt_mask)
    except ValidationError as error:
        raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def source_name(config: TrainConfig) -> str:
    """The base model's source, for records."""
    return config.model if isinstance(config.model, str) else "scratch"


def input_hashes(origin: Origin) -> dict[str, str]:
    """What identifies the model and tokenizer of a run."""
    return {"model": origin.identity(), "tokenizer": origin.tokenizer.fingerprint}


__all__ = [
    "Origin",
    "Trained",
    "build_arithmetic",
    "build_model",
    "build_reference",
    "compute_dtype",
    "find_origin",
    "input_hashes",
    "source_name",
]
