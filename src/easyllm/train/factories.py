"""Builds the model to train: weights, head, adapter, dtype and optimizer."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from easyllm.adapters import AdapterSet, attach
from easyllm.core.errors import ConfigError
from easyllm.core.manifest import hash_path, hash_value
from easyllm.models import load_tokenizer, open_source
from easyllm.models.load import OpenSource
from easyllm.models.scratch import ScratchConfig, build_scratch, scratch_model_config
from easyllm.nn.attention import Attention
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.recompute import recompute_activations
from easyllm.parallel.mesh import Mesh
from easyllm.parallel.parallel import Parallel
from easyllm.quant import StorageFormat, plan_packed
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.config import TrainConfig
from easyllm.train.deepspeed_backend import EngineOptimizer, attach_engine
from easyllm.train.division import divide, divide_tensors, gathers_in
from easyllm.train.objectives import Objective, Reference
from easyllm.train.optim import MasterOptimizer
from easyllm.train.precision import compute_dtype


@dataclass(frozen=True, slots=True)
class BaseModelSource:
    """Where the initial weights come from: a pretrained model, or random initialisation.

    Attributes:
        config: the model's configuration.
        tokenizer: the model's tokenizer.
        identity: computes a hash that identifies the weights (reads all files of a model).
        build: builds the model in a dtype, on a device; its linears are quantized if the recipe
            says so.
        values: returns the named parameters in fp32.
        check: raises unless the source's files match a model; reads no weights.
        packed: storage format of the source's weights if they are quantized, else None.
        file_bytes: size of the files of weights, which are mapped while they are read; 0 for a new
            model.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    identity: Callable[[], str]
    build: Callable[[torch.dtype, torch.device], Decoder]
    values: Callable[[Collection[str]], dict[str, Tensor]]
    check: Callable[[Decoder], None] = lambda _: None
    packed: StorageFormat | None = None
    file_bytes: int = 0


def find_base_model(config: TrainConfig) -> BaseModelSource:
    """Locates the model that a recipe names, or configures the new one; reads no weights.

    Raises:
        SourceError, CheckpointError: there is no such model or tokenizer.
        ConfigError: the values do not describe a valid model.
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
        return BaseModelSource(fresh, tokenizer, lambda: hash_value(described), build, values)
    opened = open_source(config.model)
    opened = replace(opened, config=_with_mask(opened.config, config))
    identity = partial(hash_path, opened.path)
    reader = _reader(opened, config.quantize)
    return BaseModelSource(
        opened.config,
        opened.tokenizer(),
        identity,
        reader,
        opened.parameters,
        partial(_check, opened, config.quantize),
        opened.packed,
        sum(file.size for file in opened.tensors.files),
    )


def _check(opened: OpenSource, quantize: str | None, empty: Decoder) -> None:
    """Checks that the files match a model without weights, and that they can be quantized."""
    opened.check(empty)
    if quantize is not None:
        plan_packed(opened.packed_layers(empty, quantize))


def _reader(
    opened: OpenSource, quantize: str | None
) -> Callable[[torch.dtype, torch.device], Decoder]:
    return lambda dtype, device: opened.model(dtype, device, quantize=quantize)


@dataclass(frozen=True, slots=True)
class Trained:
    """A model that is ready to be trained, and its optimizer.

    Attributes:
        model: the model.
        optimizer: the optimizer of the trainable parameters.
        adapters: the adapter being trained; None if all weights are trained.
        parallel: the ranks that the model is divided among; None in a single process.
    """

    model: Decoder
    optimizer: MasterOptimizer
    adapters: AdapterSet | None
    parallel: Parallel | None = None


def build_model(
    config: TrainConfig,
    origin: BaseModelSource,
    objective: Objective,
    device: torch.device,
    folder: Path | None = None,
    mesh: Mesh | None = None,
) -> Trained:
    """Builds the model, marks its trainable parameters, and builds the optimizer for them.

    Args:
        config: the run's configuration.
        origin: the initial weights.
        objective: the run's objective, which may change the model's head.
        device: device of the model.
        folder: an existing folder for the state of a paged optimizer; by default the system's for
            temporary files.
        mesh: the ranks that the model is divided among; None in a single process.

    Raises:
        ConfigError: all weights are to be trained but some are quantized, or the adapter does not
            fit the model.
        OutputError: the disk is too full for the state of a paged optimizer.
    """
    # DeepSpeed's engine casts the weights itself, and keeps the fp32 ones as masters
    compute = compute_dtype(config, device) if config.backend == "torch" else torch.float32
    masters: dict[str, Tensor] | None = None
    adapters: AdapterSet | None = None
    if config.adapter is not None:
        model = objective.prepare_model(origin.build(compute, device), seed=config.seed)
        adapter = config.adapter.with_token_ids(origin.tokenizer.encode)
        adapters = attach(model, adapter, seed=config.seed, also_trained=objective.also_trained)
        tensors = divide_tensors(model, config, mesh)
        trained = adapters.trained_parameters(model)
        if compute != torch.float32:  # fully trained modules start from the file's exact values
            masters = origin.values(adapters.base_parameters)
    else:
        model = objective.prepare_model(origin.build(torch.float32, device), seed=config.seed)
        if packed := model.packed_formats():
            raise cannot_train_all(config, sorted(packed))
        tensors = divide_tensors(model, config, mesh)
        if compute != torch.float32 and not gathers_in(compute, config, mesh):
            masters = {name: p.detach() for name, p in model.named_parameters()}
            model = model.to(compute)
        model = model.requires_grad_(True)
        trained = dict(model.named_parameters())
    _set_options(model, config)
    factors = {} if adapters is None else adapters.rate_factors(model)
    parallel: Parallel | None = None
    if config.backend == "deepspeed":
        assert mesh is not None, "checked by check_backend"
        given = EngineOptimizer(
            trained, config.optimizer, config.parameter_groups, rate_factors=factors
        )
        parallel = attach_engine(model, config, mesh, adapters, given)
        return Trained(model, given, adapters, parallel)
    if mesh is not None:
        parallel = divide(model, config, mesh, adapters, compute, tensors)
        trained = {name: parallel.sharding.parameters[name] for name in trained}
        if masters is not None:
            cut = parallel.parts if config.adapter is None else parallel.parts_of_full
            masters = cut(masters)
    optimizer = MasterOptimizer(
        trained,
        config.optimizer,
        config.parameter_groups,
        masters,
        rate_factors=factors,
        folder=folder,
        local=None if parallel is None else parallel.local,
    )
    return Trained(model, optimizer, adapters, parallel)


def _set_options(model: Decoder, config: TrainConfig) -> None:
    """Sets what a recipe says of how the model is computed in training."""
    for layer in model.layers:
        layer.dropout.p = config.dropout  # type: ignore[union-attr]
    model.embedding_gradient.factor = config.embedding_gradient
    if config.shifted_attention is not None:
        shift_attention(model, config.shifted_attention)
    recompute_activations(model, config.checkpoint_activations)
    if config.compile:
        for layer in model.layers:
            layer.feed_forward.compile(dynamic=True)  # type: ignore[union-attr]


def cannot_train_all(config: TrainConfig, formats: Sequence[str]) -> ConfigError:
    """Returns the error for training all weights of a model that has quantized weights."""
    return ConfigError(
        f"the weights of {source_name(config)} are quantized ({', '.join(formats)}) and cannot all "
        "be trained; train an adapter on them (adapter.kind=lora)"
    )


def build_reference(
    config: TrainConfig, origin: BaseModelSource, objective: Objective, trained: Trained
) -> Reference:
    """Returns the frozen initial model of the run, as a reference for the objective.

    If only the adapter is trained, the reference is the trained model itself with the adapter
    bypassed; otherwise it is a separate copy. An objective may name another reference model.

    Raises:
        ConfigError: the reference model has another tokenizer or vocabulary.
        SourceError, CheckpointError: there is no such model.
    """
    device = trained.model.device
    if objective.reference_source is not None:
        other = check_reference(origin, objective.reference_source)
        model = other.model(compute_dtype(config, device), device)
        return Reference(model.requires_grad_(False).eval(), without_adapter=False)
    if trained.adapters is not None and not trained.adapters.base_parameters:
        return Reference(trained.model, without_adapter=True)
    model = objective.prepare_model(
        origin.build(compute_dtype(config, device), device), seed=config.seed
    )
    return Reference(model.requires_grad_(False).eval(), without_adapter=False)


def check_reference(origin: BaseModelSource, source: str) -> OpenSource:
    """Opens a reference model, without reading its weights.

    Raises:
        ConfigError: it has another tokenizer or vocabulary than the trained model.
        SourceError, CheckpointError: there is no such model.
    """
    other = open_source(source)
    if other.tokenizer().fingerprint != origin.tokenizer.fingerprint:
        raise ConfigError(
            f"objective.reference_model={source} has another tokenizer than model, so their "
            "log-probabilities are of different tokens; give a reference with the same tokenizer, "
            "or null for the initial model"
        )
    if other.config.vocab_size != origin.config.vocab_size:
        raise ConfigError(
            f"objective.reference_model={source} has a vocabulary of {other.config.vocab_size}, "
            f"but model one of {origin.config.vocab_size}; give a reference with the same one"
        )
    return other


def _with_mask(config: ModelConfig, train: TrainConfig) -> ModelConfig:
    if train.prompt_mask is None:
        return config
    try:
        return config.changed(prompt_mask=train.prompt_mask)
    except ValidationError as error:
        raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def shift_attention(model: Decoder, group: int) -> None:
    """Limits attention in training to shifted groups of tokens (`ops/shifted_attention`).

    Raises:
        ConfigError: a layer does not support it.
    """
    for number, layer in enumerate(model.layers):
        mixer = layer.mixer
        reason = model.config.layers[number].mixer.kind.replace("_", " ")
        if isinstance(mixer, Attention):
            reason = mixer.shift_unsupported_reason() or ""
        if model.config.has_prefix:
            reason = f"prompt_mask={model.config.prompt_mask}"
        if reason:
            raise ConfigError(
                f"shifted_attention does not support {reason} (layer {number}); leave it out"
            )
        mixer.shift_group = group  # type: ignore[union-attr]


def source_name(config: TrainConfig) -> str:
    """Returns the base model's source, for records."""
    return config.model if isinstance(config.model, str) else "scratch"


def input_hashes(origin: BaseModelSource) -> dict[str, str]:
    """Returns hashes that identify the model and tokenizer of a run."""
    return {"model": origin.identity(), "tokenizer": origin.tokenizer.fingerprint}


__all__ = [
    "BaseModelSource",
    "Trained",
    "build_model",
    "build_reference",
    "check_reference",
    "find_base_model",
    "input_hashes",
    "source_name",
]
