"""What a DeepSpeed configuration means for each rank: bytes that stay, and messages of a step.

    bytes      stage 0  (w + g + s) Ψ           stage 1  (w + g + s/W) Ψ
               stage 2  (w + (g + s)/W) Ψ       stage 3  (w + g + s) Ψ/W

(Rajbhandari et al. 2019, arXiv 1910.02054, sections 3.1 and 5.) With bf16 or fp16, w = g = 2 and
s = 12 bytes a parameter (fp32 master weights and two moments); with fp32, w = g = 4 and s = 8.
"""

import math
from dataclasses import asdict, dataclass

from easyllm.core.json_types import JsonObject
from easyllm.parallel.deepspeed_values import DeepSpeedSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """What each of W ranks holds between steps, and sends in a step.

    Attributes:
        weight_bytes, gradient_bytes, state_bytes: bytes per rank.
        sent_elements: elements that a rank sends in a step, with ring algorithms.
        messages: number of collectives of a step, by operation.
    """

    weight_bytes: int
    gradient_bytes: int
    state_bytes: int
    sent_elements: int
    messages: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """All bytes that stay, without activations."""
        return self.weight_bytes + self.gradient_bytes + self.state_bytes

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def plan_ranks(
    settings: DeepSpeedSettings, parameters: int, *, layers: int, world: int
) -> RankPlan:
    """Returns the plan of each data-parallel rank in a full fine-tune with AdamW.

    Args:
        settings: the resolved configuration.
        parameters: Ψ, the number of parameters.
        layers: number of layers, which stage 3 gathers one at a time.
        world: W, the number of data-parallel ranks.

    Example:
        >>> from easyllm.parallel.deepspeed_config import RecipeValues, read_deepspeed
        >>> values = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
        >>> settings = read_deepspeed(values, RecipeValues(world=64, batch_size=64))
        >>> plan_ranks(settings, 7_500_000_000, layers=32, world=64).total_bytes / 1e9
        1.875
    """
    weight, state = (4, 8) if settings.precision == "fp32" else (2, 12)
    stage = settings.stage
    share = [1 if stage < level else 1 / world for level in (3, 2, 1)]
    sizes = (weight, weight, state)
    weights, gradients, states = (
        math.ceil(parameters * size * part) for size, part in zip(sizes, share, strict=True)
    )
    steps, ring = settings.accumulation, (world - 1) / world
    buckets = math.ceil(parameters / settings.bucket_elements)
    if stage == 0:
        messages, passes = {"all_reduce": buckets}, 2
    elif stage < 3:
        reductions = buckets * (steps if stage == 2 else 1)
        messages = {"reduce_scatter": reductions, "all_gather": buckets}
        passes = 1 + (steps if stage == 2 else 1)
    else:
        units = layers + 1
        messages = {"all_gather": 2 * units * steps, "reduce_scatter": units * steps}
        passes = 3 * steps
    return RankPlan(
        weight_bytes=weights,
        gradient_bytes=gradients,
        state_bytes=states,
        sent_elements=round(passes * parameters * ring),
        messages=messages if world > 1 else {},
    )


__all__ = ["RankPlan", "plan_ranks"]
