"""DeepSpeed's own engine around a decoder, for runs with `backend: deepspeed`.

DeepSpeed averages gradients over ranks; here they are sums divided by the number of terms of all
ranks, so that a loss enters its backward pass times the number of ranks. Under ZeRO-3 its hooks
gather the weights of a module when the module is called. Our layers read the weights of several
modules in one product, so that the unit is a layer (a "leaf" to DeepSpeed), and everything outside
the layers belongs to the root. (Checked with DeepSpeed 0.19.8.)
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from types import ModuleType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from easyllm.core.errors import ConfigError, install
from easyllm.core.json_types import JsonMapping
from easyllm.nn.decoder import Decoder, DecoderLayer
from easyllm.parallel.mesh import Mesh
from easyllm.parallel.parallel import Parallel
from easyllm.parallel.pieces import Piece
from easyllm.parallel.sharding import Sink

T = TypeVar("T")


class Engine(Protocol):
    """What is used of `deepspeed.DeepSpeedEngine`."""

    optimizer: Any

    def __call__(self, work: Callable[[], T]) -> T: ...

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> Tensor: ...

    def step(self) -> None: ...

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...

    def get_global_grad_norm(self) -> float | None: ...

    def zero_optimization_stage(self) -> int: ...

    def bfloat16_enabled(self) -> bool: ...


class EngineParallel(Parallel):
    """Ranks among which DeepSpeed divides a model: it holds gradients and updates weights.

    Args:
        mesh: the ranks, all of them data-parallel.
        engine: DeepSpeed's engine, as `start_engine` returns it.
        trained: the trainable parameters, by name.
    """

    def __init__(self, mesh: Mesh, engine: Engine, trained: Mapping[str, nn.Parameter]) -> None:
        super().__init__(mesh, _EngineSharding(engine, trained))
        self.engine = engine

    def forward(self, work: Callable[[], T]) -> T:
        """Calls `work` in a forward pass of the engine, which makes all weights available."""
        return self.engine(work)

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of a term of the loss that all ranks sum."""
        self.engine.backward(loss * self.mesh.data.size, scale_wrt_gas=False)

    @torch.no_grad()
    def restore_full(self, model: Decoder, masters: Iterable[tuple[str, Tensor]]) -> None:
        """Gives rank 0 the full fp32 weights, to save them; the model is not trained afterwards."""
        del masters  # they are DeepSpeed's
        for parameter in model.parameters():
            full = full_values(parameter)
            if self.is_first:
                parameter.data = full.clone()


class _EngineSharding:
    """The part of `Sharding` that is left to do where DeepSpeed reduces and gathers."""

    is_sharded = False

    def __init__(self, engine: Engine, trained: Mapping[str, nn.Parameter]) -> None:
        self._engine = engine
        self.parameters = self.local = dict(trained)
        self.pieces = {name: Piece.whole(shape_of(p)) for name, p in trained.items()}

    def begin_micro_batch(self, *, last: bool) -> None:
        """Tells the engine whether the step ends with this micro-batch."""
        self._engine.set_gradient_accumulation_boundary(last)

    def end_micro_batch(self) -> None:
        """The engine reduces gradients within its backward pass."""

    def reduce(self, sink: Sink) -> None:
        """The engine keeps the gradients for its own optimizer."""

    def refresh(self) -> None:
        """The engine gathers weights when it has updated them, or when they are used."""


class _Root(nn.Module):
    """The module that DeepSpeed wraps: its forward pass is whatever work it is given."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        return work()


def start_engine(
    model: Decoder, groups: Sequence[Mapping[str, Any]], values: JsonMapping, device: torch.device
) -> Engine:
    """Returns DeepSpeed's engine for a model, which it divides in place.

    Args:
        model: the model, in fp32; the engine casts it if `values` enable bf16.
        groups: parameter groups, as for an optimizer of PyTorch.
        values: a complete configuration, without `auto`.
        device: the device of this rank.

    Raises:
        ConfigError: DeepSpeed is not installed, or refuses the configuration.
    """
    deepspeed = load_deepspeed(device)
    root = _Root(model)
    sharded = int(values["zero_optimization"]["stage"]) == 3
    if sharded:
        deepspeed.utils.set_z3_leaf_modules(root, [DecoderLayer])
    try:
        with redirect_stdout(sys.stderr):  # it prints; standard output is for results
            deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl")
            engine: Engine = deepspeed.initialize(
                model=root, model_parameters=[dict(group) for group in groups], config=dict(values)
            )[0]
    except (ValueError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"DeepSpeed does not accept the configuration ({reason[:300]}); change the file, or "
            "set backend=torch"
        ) from error
    if sharded:
        for name, parameter in model.named_parameters():
            if not name.startswith("layers."):
                deepspeed.zero.register_external_parameter(root, parameter)
    return engine


def load_deepspeed(device: torch.device) -> ModuleType:
    """Imports DeepSpeed, whose log is limited to warnings.

    Raises:
        ConfigError: it is not installed.
    """
    if device.type == "cpu":  # read when it is imported; otherwise it may look for other devices
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed as found
    except ImportError:
        raise ConfigError(f"backend=deepspeed needs DeepSpeed; {install('deepspeed')}") from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings(  # DeepSpeed 0.19 calls collectives by names that torch 2.13 replaced
        "ignore", message="`torch.distributed", category=FutureWarning
    )
    module: ModuleType = found
    return module


def full_values(parameter: nn.Parameter) -> Tensor:
    """Returns a parameter's full values, those of its master weight if it has one.

    All ranks must call it, for the same parameters in the same order.
    """
    import deepspeed

    full: Tensor | None = None
    if parameter.requires_grad:
        full = deepspeed.utils.safe_get_full_fp32_param(parameter)
    if full is not None:
        return full
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Returns the shape of the full parameter, of which ZeRO-3 leaves an empty tensor."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def held_values(parameter: nn.Parameter) -> Tensor:
    """Returns the values that this rank holds of a parameter."""
    held: Tensor = getattr(parameter, "ds_tensor", parameter)
    return held.detach()


__all__ = ["EngineParallel", "full_values", "held_values", "load_deepspeed", "start_engine"]
