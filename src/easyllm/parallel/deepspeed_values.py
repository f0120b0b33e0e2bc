"""What a DeepSpeed configuration is resolved with, and to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Fate = Literal["honoured", "mapped", "ignored"]


@dataclass(frozen=True, slots=True)
class ResolvedKey:
    """What became of a key: its value, with `auto` resolved, and why."""

    key: str
    value: Any
    fate: Fate
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeValues:
    """The values of the recipe, which `auto` stands for.

    Attributes:
        world: number of data-parallel ranks.
        batch_size: sequences per step.
        micro_batch: sequences per rank and micro-batch.
        clip_norm: maximum gradient norm, or None.
        learning_rate, betas, eps, weight_decay: of the optimizer.
        warmup_steps, total_steps: of the schedule; None if not known.
        hidden_size: width of the model, for bucket sizes; None if not known.
        precision: `bf16`, `fp16` or `fp32`.
    """

    world: int = 1
    batch_size: int = 1
    micro_batch: int = 1
    clip_norm: float | None = None
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int | None = None
    total_steps: int | None = None
    hidden_size: int | None = None
    precision: str = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedSettings:
    """A resolved configuration.

    Attributes:
        stage: ZeRO stage, 0 to 3.
        batch_size, micro_batch, accumulation: sequences per step, per rank and micro-batch, and
            micro-batches per step and rank.
        clip_norm: maximum gradient norm; None does not clip.
        precision: `bf16`, `fp16` or `fp32`.
        loss_scale: of fp16: `initial_scale_power`, `loss_scale_window`, `hysteresis`,
            `min_loss_scale`.
        bucket_elements: elements of a gradient bucket.
        offload: whether weights or optimizer state are to stay in host memory.
        tensor: tensor-parallel degree.
        optimizer, scheduler: type and resolved parameters; None leaves them to the recipe.
        keys: what became of each key.
    """

    stage: int
    batch_size: int
    micro_batch: int
    accumulation: int
    clip_norm: float | None
    precision: str
    loss_scale: Mapping[str, float]
    bucket_elements: int
    offload: bool
    tensor: int
    optimizer: tuple[str, Mapping[str, Any]] | None
    scheduler: tuple[str, Mapping[str, Any]] | None
    keys: tuple[ResolvedKey, ...] = field(default=())


__all__ = ["DeepSpeedSettings", "Fate", "RecipeValues", "ResolvedKey"]
