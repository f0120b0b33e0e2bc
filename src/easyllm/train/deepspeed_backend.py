"""Runs with `backend: deepspeed`: DeepSpeed's engine does the steps, the rest of a run is ours.

Schedule, parameter groups, packing and evaluation are the recipe's. What DeepSpeed would do without
being asked is settled before it starts: `gradient_clipping` is always written (it clips at 1.0 if
the key is absent), `auto` is resolved (its own parser fails on it), the warm-up is linear (its
default is logarithmic).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from easyllm.adapters import AdapterSet
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.nn.decoder import Decoder
from easyllm.parallel.config import FULLY_SHARDED
from easyllm.parallel.deepspeed_config import AUTO, read_deepspeed
from easyllm.parallel.deepspeed_engine import Engine, EngineParallel, held_values, start_engine
from easyllm.parallel.deepspeed_values import DeepSpeedSettings
from easyllm.parallel.mesh import Mesh
from easyllm.train.config import TrainConfig
from easyllm.train.deepspeed import recipe_values
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig, MuonConfig
from easyllm.train.parameter_groups import Group

NAMES = {"adamw": "AdamW", "sgd": "SGD"}
"""DeepSpeed's names of our optimizers."""


class EngineOptimizer(MasterOptimizer):
    """The optimizer of DeepSpeed's engine: it holds master weights, gradients and state itself.

    Takes the arguments of `MasterOptimizer`; `attach_engine` sets the engine.
    """

    engine: Engine

    def _build_states(self, folder: Path) -> None:
        """Builds nothing: the engine has its own."""

    @property
    def groups(self) -> list[Group]:
        """The parameter groups that are trained."""
        return self._groups

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Returns whether the weights that this rank holds are finite (no NaN or Inf)."""
        held = (held_values(parameter) for parameter in self._parameters.values())
        return all(bool(torch.isfinite(values).all()) for values in held)

    def take_step(self, factor: float) -> float:
        """Clips the gradients, updates the weights and clears the gradients.

        Args:
            factor: the schedule's factor on the learning rates.

        Returns:
            The gradient norm before clipping; NaN if it is NaN, or if DeepSpeed computes none.
        """
        for mine, theirs in zip(self._groups, self.engine.optimizer.param_groups, strict=True):
            theirs["lr"] = mine.learning_rate * factor
        unsharded = None
        if not self.engine.zero_optimization_stage() and not self.engine.bfloat16_enabled():
            unsharded = self.grad_norm()  # it keeps none of its own there
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if unsharded is None else unsharded
        return math.nan if norm is None else float(norm)


def attach_engine(
    model: Decoder,
    config: TrainConfig,
    mesh: Mesh,
    adapters: AdapterSet | None,
    optimizer: EngineOptimizer,
) -> EngineParallel:
    """Gives a model that is ready to be trained to DeepSpeed, in place.

    Raises:
        ConfigError: DeepSpeed is not installed, or cannot train the model.
    """
    if model.config.has_experts:
        raise unsupported("mixtures of experts")
    if adapters is not None and type(adapters).after_backward is not AdapterSet.after_backward:
        assert config.adapter is not None, "the recipe has an adapter"
        raise unsupported(f"adapter.kind={config.adapter.kind}, which reads whole gradients")
    if adapters is not None and config.parallel.layout in FULLY_SHARDED:
        raise unsupported("adapters under stage 3")
    assert config.deepspeed is not None, "checked by the configuration"
    path = Path(config.deepspeed)
    world = mesh.data.size
    settings = read_deepspeed(path, recipe_values(config, world, model.config.hidden_size))
    values = engine_values(json.loads(path.read_text("utf-8")), settings, config, model.device)
    groups = [
        {
            "params": [optimizer.masters[name] for name in group.names],
            "lr": group.learning_rate,
            "weight_decay": group.weight_decay,
        }
        for group in optimizer.groups
    ]
    engine = optimizer.engine = start_engine(model, groups, values, model.device)
    trained: Mapping[str, nn.Parameter] = {
        n: p for n, p in model.named_parameters() if n in optimizer.masters
    }
    return EngineParallel(mesh, engine, trained)


def engine_values(
    file: Mapping[str, Any], settings: DeepSpeedSettings, config: TrainConfig, device: torch.device
) -> JsonObject:
    """Returns a complete configuration for DeepSpeed.

    Args:
        file: the contents of the user's file.
        settings: what they resolve to.
        config: the recipe, with the file's values.
        device: device of the model.
    """
    values: JsonObject = json.loads(json.dumps(file))
    for each in settings.keys:
        _resolve(values, each.key.split("."), each.value)
    zero = values.setdefault("zero_optimization", {})
    zero["stage"] = settings.stage
    values |= {
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": config.clip_norm or 0.0,
        "bf16": {"enabled": settings.precision == "bf16"},
        "fp16": {"enabled": False},
        "optimizer": _optimizer(values.get("optimizer", {}), config, device),
    }
    values.setdefault("zero_allow_untested_optimizer", True)
    for ours in ("scheduler", "activation_checkpointing", "bfloat16", "compile"):
        values.pop(ours, None)
    return values


def _optimizer(section: Mapping[str, Any], config: TrainConfig, device: torch.device) -> JsonObject:
    optimizer = config.optimizer
    params = dict(section.get("params", {}))
    if not section and isinstance(optimizer, AdamWConfig) and device.type == "cpu":
        params["torch_adam"] = True  # DeepSpeed's own would be compiled first
    params |= {"lr": optimizer.learning_rate, "weight_decay": optimizer.weight_decay}
    if isinstance(optimizer, AdamWConfig):
        params |= {"betas": list(optimizer.betas), "eps": optimizer.eps}
    elif not isinstance(optimizer, MuonConfig):
        params |= {"momentum": optimizer.momentum, "nesterov": optimizer.nesterov}
    return {"type": section.get("type", NAMES[optimizer.kind]), "params": params}


def _resolve(values: JsonObject, path: list[str], value: object) -> None:
    """Replaces `auto` at a path by its value."""
    *above, leaf = path
    for key in above:
        values = values.get(key, {})
    if values.get(leaf) == AUTO:
        values[leaf] = value


def check_backend(config: TrainConfig, world: int) -> None:
    """Checks that the backend of a recipe can train it.

    Args:
        config: the recipe, with the values of its DeepSpeed configuration.
        world: number of processes; 0 if they are not started yet.

    Raises:
        ConfigError: DeepSpeed's engine cannot; the message names the backend that can.
    """
    if config.backend != "deepspeed":
        return
    optimizer = config.optimizer
    reasons = {
        f"objective.kind={config.objective.kind}": config.objective.kind != "language_model",
        f"quantize={config.quantize}": config.quantize is not None,
        f"parallel.tensor={config.parallel.tensor}": config.parallel.tensor > 1,
        f"precision={config.precision}": config.precision in ("fp16", "bf16_autocast"),
        f"optimizer.kind={optimizer.kind}": optimizer.kind not in NAMES,
        "optimizer.state=int8": getattr(optimizer, "state", "") == "int8",
        "optimizer.paged=true": getattr(optimizer, "paged", False),
        "compile=true": config.compile,
        f"checkpoint_activations={config.checkpoint_activations}": (
            config.checkpoint_activations != "none"
        ),
        "samples": config.samples is not None,
        "retention": bool(config.retention),
        "keep_best=true": config.keep_best,
        "checkpoints to resume from (set save_every=0)": bool(config.save_every),
    }
    for what, holds in reasons.items():
        if holds:
            raise unsupported(what)
    if world == 1:
        raise ConfigError(
            "backend=deepspeed trains in processes that a launcher has started, but this is a "
            "single one; add --nproc 2, or set backend=torch"
        )


def unsupported(what: str) -> ConfigError:
    """Returns the error for a recipe that DeepSpeed's engine cannot train here."""
    return ConfigError(f"backend=deepspeed does not support {what}; set backend=torch, which does")


__all__ = ["EngineOptimizer", "attach_engine", "check_backend", "engine_values", "unsupported"]
