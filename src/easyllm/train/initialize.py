"""`easyllm.initialize`: a training engine for a loop of your own, as DeepSpeed's.

    engine = easyllm.initialize(model, "ds_config.json")
    for batch in batches:
        loss = my_loss(engine.model, batch)   # a mean over the micro-batch
        engine.backward(loss)
        engine.step()                         # updates after gradient_accumulation_steps calls

The result equals a plain loop that divides each loss by the number of micro-batches of a step, over
all ranks: as in DeepSpeed, the gradient is the mean of the micro-batches' means. Give `backward`
the number of tokens that each loss is a mean over to weight them correctly.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError
from easyllm.nn.decoder import Decoder
from easyllm.parallel.config import ParallelConfig
from easyllm.parallel.deepspeed_config import DeepSpeedSettings, RecipeValues, read_deepspeed
from easyllm.parallel.mesh import join, world_size
from easyllm.parallel.parallel import Parallel, parallelize
from easyllm.train.loss_scaler import LossScaler
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig, MuonConfig, Optimizer, SGDConfig

LAYOUTS = ("ddp", "zero1", "zero2", "zero3")


class Engine:
    """A model, its optimizer and the ranks that train it.

    Args:
        model: the model; its trainable parameters require gradients.
        settings: the resolved configuration.
        parallel: the ranks; None in a single process.

    Attributes:
        settings: the resolved configuration; `settings.keys` says what became of each key.
        global_steps: number of optimizer steps.
        skipped_steps: number of steps without an update, because a gradient was NaN or infinite.
    """

    def __init__(
        self, model: Decoder, settings: DeepSpeedSettings, parallel: Parallel | None = None
    ) -> None:
        self.model, self.settings, self.parallel = model, settings, parallel
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ConfigError(
                "the model has no parameter that requires a gradient; call "
                "model.requires_grad_(True) before easyllm.initialize"
            )
        local = None if parallel is None else parallel.local
        self.optimizer = MasterOptimizer(trained, _optimizer(settings), local=local)
        self.scaler = None
        if settings.precision == "fp16":
            self.scaler = LossScaler(**scaler_options(settings.loss_scale))
        self.global_steps = self.skipped_steps = self.micro_steps = 0
        self._factor = 1.0
        self._weights = 0.0

    def backward(self, loss: Tensor, *, num_tokens: int | None = None) -> None:
        """Accumulates the gradient of a micro-batch.

        Args:
            loss: the mean loss of the micro-batch (scalar).
            num_tokens: number of tokens that it is a mean over; the step is then the mean over all
                tokens of all ranks. None counts every micro-batch alike, as DeepSpeed does.
        """
        weight = 1.0 if num_tokens is None else float(num_tokens)
        self._weights += weight
        self.micro_steps += 1
        last = self.is_boundary
        if self.parallel is not None:
            self.parallel.begin_micro_batch(last=last)
        scale = 1.0 if self.scaler is None else self.scaler.scale
        (loss * (weight * scale)).backward()
        if self.parallel is not None:
            self.parallel.end_micro_batch()

    @property
    def is_boundary(self) -> bool:
        """Whether the next `step` updates the weights."""
        return self.micro_steps % self.settings.accumulation == 0

    def step(self, rate_factor: float = 1.0) -> float | None:
        """Updates the weights if all micro-batches of the step are accumulated.

        Args:
            rate_factor: factor on the learning rate (of a schedule of your own).

        Returns:
            The gradient norm before clipping; None if nothing was updated.
        """
        if not self.micro_steps or not self.is_boundary:
            return None
        total = torch.tensor(self._weights, dtype=torch.float64)
        if self.parallel is not None:
            self.parallel.reduce(self.optimizer.set_gradient)
            total = self.parallel.mesh.data.all_reduce(total.to(self.parallel.mesh.device))
        self._weights = 0.0
        optimizer = self.optimizer
        scale = 1.0 if self.scaler is None else self.scaler.scale
        optimizer.scale_gradients(1.0 / (max(float(total), 1.0) * scale))
        norm_of = optimizer.grad_norm
        norm = norm_of() if self.parallel is None else self.parallel.grad_norm(norm_of)
        is_bad = not torch.isfinite(torch.tensor(norm))
        if self.scaler is not None:
            self.scaler.update(bool(is_bad))
        if is_bad:
            optimizer.clear()
            self.skipped_steps += 1
            return None
        if self.settings.clip_norm is not None:
            optimizer.clip(norm, self.settings.clip_norm)
        optimizer.step(rate_factor)
        if self.parallel is not None:
            self.parallel.refresh()
        self.global_steps += 1
        return norm


def initialize(model: Decoder, ds_config: str | Path | Mapping[str, Any]) -> Engine:
    """Returns an engine that trains a model as a DeepSpeed configuration says.

    In a process started by `torchrun`, the model is divided among the ranks, in place.

    Args:
        model: the model, in fp32 (or in the dtype that the configuration enables).
        ds_config: a `ds_config.json`, or its contents.

    Raises:
        ConfigError: the configuration cannot be used; the message names everything at once.

    Example:
        engine = easyllm.initialize(model, {"train_micro_batch_size_per_gpu": 4})
    """
    source = Path(ds_config) if isinstance(ds_config, str | Path) else ds_config
    recipe = RecipeValues(world=world_size(), batch_size=world_size())
    settings = read_deepspeed(source, recipe)
    if settings.scheduler is not None:
        raise ConfigError(
            "easyllm.initialize takes no scheduler; give step() the factor on the learning rate, "
            "and remove scheduler from the configuration"
        )
    if world_size() == 1:
        return Engine(model, settings)
    layout = LAYOUTS[settings.stage]
    config = ParallelConfig.model_validate(
        {"layout": layout, "bucket_mb": settings.bucket_elements * 4 / 2**20}
    )
    mesh = join(config, model.device.type)
    return Engine(model, settings, parallelize(model, mesh, config))


def scaler_options(scale: Mapping[str, float]) -> dict[str, Any]:
    """Returns the arguments of `LossScaler` for the keys of DeepSpeed's `fp16`."""
    return {
        "initial_scale": 2.0 ** scale.get("initial_scale_power", 16),
        "window": int(scale.get("loss_scale_window", 1000)),
        "hysteresis": int(scale.get("hysteresis", 2)),
        "min_scale": scale.get("min_loss_scale", 1.0),
    }


def _optimizer(settings: DeepSpeedSettings) -> Optimizer:
    if settings.optimizer is None:
        return AdamWConfig(learning_rate=1e-3)
    kind, params = settings.optimizer
    values = {("learning_rate" if name == "lr" else name): v for name, v in params.items()}
    match kind:
        case "sgd":
            return SGDConfig.model_validate(values)
        case "muon":
            return MuonConfig.model_validate(values)
    return AdamWConfig.model_validate(values)


__all__ = ["Engine", "initialize"]
