"""Divides the model of a run among its ranks, and checks that the recipe allows it."""

from contextlib import AbstractContextManager, nullcontext

import torch

from easyllm.adapters import AdapterSet
from easyllm.adapters.adapter import Adapter
from easyllm.adapters.lora import LoRA
from easyllm.batches.rank_share import Ranks, RankShare
from easyllm.core.device import pick_device
from easyllm.core.errors import ConfigError
from easyllm.nn.decoder import Decoder
from easyllm.parallel.config import FULLY_SHARDED
from easyllm.parallel.failures import collective_errors
from easyllm.parallel.mesh import Mesh, check_degrees, join, world_size
from easyllm.parallel.parallel import Parallel, parallelize
from easyllm.parallel.tensor import TensorSharding, shard_tensors
from easyllm.train.config import TrainConfig
from easyllm.train.objectives import Objective
from easyllm.train.optim_config import AdamWConfig, SGDConfig
from easyllm.train.training_data import TrainingData


def join_ranks(config: TrainConfig) -> Mesh | None:
    """Joins the other ranks of a run; None in a single process.

    Raises:
        ConfigError: the processes cannot be divided as the recipe says.
    """
    if world_size() == 1:
        check_degrees(config.parallel, 1)
        return None
    return join(config.parallel, pick_device(config.device).type)


def naming_late_ranks(
    parallel: Parallel | None, *, config: TrainConfig
) -> AbstractContextManager[None]:
    """Returns a context in which the errors of collectives say which rank is missing."""
    if parallel is None:
        return nullcontext()
    return collective_errors(config.parallel.timeout_s, parallel.late_ranks)


def gathers_in(compute: torch.dtype, config: TrainConfig, mesh: Mesh | None) -> bool:
    """Whether weights stay fp32 and are only gathered in the compute dtype (FSDP2)."""
    sharded = mesh is not None and config.parallel.layout in FULLY_SHARDED
    return sharded and config.adapter is None and compute != torch.float32


def divide(
    model: Decoder,
    config: TrainConfig,
    mesh: Mesh,
    adapters: AdapterSet | None,
    compute: torch.dtype,
    tensors: TensorSharding | None = None,
) -> Parallel:
    """Divides a model that is ready to be trained among ranks, in place.

    Raises:
        ConfigError: the layout does not support the recipe.
    """
    check_division(config, adapters)
    gathered = compute if gathers_in(compute, config, mesh) else None
    return parallelize(model, mesh, config.parallel, compute=gathered, tensors=tensors)


def divide_tensors(model: Decoder, config: TrainConfig, mesh: Mesh | None) -> TensorSharding | None:
    """Divides every layer among the tensor-parallel ranks, in place; None if there are none.

    Raises:
        ConfigError: the objective or the model does not support it.
    """
    if mesh is None or mesh.tensor.size == 1:
        return None
    kind = config.objective.kind
    if kind != "language_model":
        raise ConfigError(
            f"parallel.tensor={mesh.tensor.size} divides the vocabulary, which objective {kind} "
            "does not support, only language_model; set parallel.tensor=1 with parallel.layout "
            "zero1, zero2, zero3 or fsdp"
        )
    return shard_tensors(
        model, mesh.tensor, sequence=config.parallel.sequence, adapter_axes=lora_axes
    )


def lora_axes(adapter: Adapter, axis: int) -> dict[str, int | None] | None:
    """Returns which axes of LoRA's factors follow a layer whose weight is divided along `axis`.

    A column-parallel layer divides B and keeps A; a row-parallel one divides A and keeps B.
    """
    if type(adapter) is not LoRA:
        return None
    return {"lora_A": None, "lora_B": 0} if axis == 0 else {"lora_A": 1, "lora_B": None}


def check_division(config: TrainConfig, adapters: AdapterSet | None) -> None:
    """Checks that the layout can train what the recipe sets.

    Raises:
        ConfigError: it cannot; the message names a layout that can.
    """
    layout = config.parallel.layout
    if layout == "ddp":
        return
    optimizer = config.optimizer
    name = None
    if isinstance(optimizer, AdamWConfig):
        if optimizer.state == "int8":
            name = "optimizer.state=int8 quantizes blocks of whole weights"
        elif optimizer.paged:
            name = "optimizer.paged=true keeps whole moments in a file"
    elif not isinstance(optimizer, SGDConfig):
        name = f"optimizer.kind={optimizer.kind} needs whole matrices"
    if adapters is not None and type(adapters).after_backward is not AdapterSet.after_backward:
        assert config.adapter is not None, "the recipe has an adapter"
        name = f"adapter.kind={config.adapter.kind} reads whole gradients"
    if name is not None:
        raise ConfigError(
            f"{name}, but parallel.layout={layout} gives each rank a part of them; set "
            "parallel.layout=ddp"
        )


def share_data(data: TrainingData, config: TrainConfig, mesh: Mesh, objective: Objective) -> None:
    """Gives this rank its share of every step.

    Raises:
        ConfigError: the objective or its layout does not allow it.
    """
    if reason := undivided_reason(config, objective):
        raise ConfigError(reason)
    data.loader.share = RankShare(mesh.data.rank, mesh.data.size)
    objective.ranks = Ranks(mesh.data.rank, mesh.data.size, mesh.data.gather_values)


def undivided_reason(config: TrainConfig, objective: Objective) -> str:
    """Returns why the layout of a recipe cannot train its objective; empty if it can."""
    kind, layout = config.objective.kind, config.parallel.layout
    if objective.undivided:
        return (
            f"objective {kind} is not trained by several processes, because {objective.undivided}; "
            "run it with one process"
        )
    if objective.generates_data and layout in FULLY_SHARDED:
        return (
            f"objective {kind} samples from the model, but parallel.layout={layout} gives each "
            "rank a part of its weights; set parallel.layout to ddp, zero1 or zero2"
        )
    return ""


__all__ = [
    "check_division",
    "divide",
    "gathers_in",
    "join_ranks",
    "naming_late_ranks",
    "share_data",
    "undivided_reason",
]
