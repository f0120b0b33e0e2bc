"""The model of a run, ready to be trained: weights, head, adapter, dtype, optimizer."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from easyllm.adapters import adapter_parameters, attach
from easyllm.core.device import bf16_is_fast
from easyllm.core.errors import ConfigError
from easyllm.core.manifest import hash_path, hash_value
from easyllm.models import load_tokenizer, open_source, to_classifier
from easyllm.models.load import OpenSource
from easyllm.models.scratch import ScratchConfig, build_scratch, scratch_model_config
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.recompute import recompute_activations
from easyllm.ops.cross_entropy import STEADY_ROWS
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.config import ClassifierConfig, TrainConfig
from easyllm.train.loop import Arithmetic
from easyllm.train.loss_scaler import LossScaler
from easyllm.train.objectives import Classifier, LanguageModel, Objective
from easyllm.train.optim import MasterOptimizer

HEAD = "score."


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the weights come from: a model's source, or nothing yet.

    Attributes:
        config: of the model.
        tokenizer: that belongs to it.
        identity: computes a hash of what the weights are made from (which reads all of a model's files).
        build: the model in a dtype, on a device.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    identity: Callable[[], str]
    build: Callable[[torch.dtype, torch.device], Decoder]


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

        described = [fresh.model_dump(mode="json"), seed]
        return Origin(fresh, tokenizer, lambda: hash_value(described), build)
    opened = open_source(config.model)
    opened = replace(opened, config=_with_mask(opened.config, config))
    identity = partial(hash_path, opened.path)
    return Origin(opened.config, opened.tokenizer(), identity, _reader(opened))


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


def build_objective(config: TrainConfig) -> Objective:
    """What is minimised."""
    if isinstance(config.objective, ClassifierConfig):
        return Classifier()
    wanted = config.objective
    return LanguageModel(label_smoothing=wanted.label_smoothing, z_loss=wanted.z_loss)


def build_model(
    config: TrainConfig, origin: Origin, device: torch.device
) -> tuple[Decoder, MasterOptimizer]:
    """The model with what is trained in it marked, and the optimizer of that."""
    compute = compute_dtype(config, device)
    masters: dict[str, Tensor] | None = None
    if config.adapter is not None:
        model = attach(
            _headed(origin.build(compute, device), config), config.adapter, seed=config.seed
        )
        trained = adapter_parameters(model)
        if isinstance(config.objective, ClassifierConfig):  # the fresh head is trained whole
            for name, parameter in model.named_parameters():
                if name.startswith(HEAD):
                    parameter.requires_grad_(True)
                    trained[name] = parameter
    else:
        model = _headed(origin.build(torch.float32, device), config)
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
    return model, optimizer


def _headed(model: Decoder, config: TrainConfig) -> Decoder:
    """The model with a head of labels where one is trained and it has none."""
    wanted = config.objective
    if not isinstance(wanted, ClassifierConfig) or model.config.num_labels == wanted.num_labels:
        return model
    return to_classifier(model, wanted.num_labels, seed=config.seed)


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
    "build_arithmetic",
    "build_model",
    "build_objective",
    "compute_dtype",
    "find_origin",
    "input_hashes",
    "source_name",
]
