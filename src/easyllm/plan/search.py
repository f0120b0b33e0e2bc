"""Lists the ways to split a training step over GPUs: those that fit, fastest first, and the others.

The time of a step is its matrix products at the GPU's peak and an assumed utilisation, plus the
pipeline's bubble, the all-reduces of tensor parallelism (which block), and what remains of the
gradients' traffic after the backward pass that hides it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.nn.config import ModelConfig
from easyllm.nn.recompute import Recompute
from easyllm.plan.compute import TrainingFlops, training_flops
from easyllm.plan.hardware import Hardware
from easyllm.plan.parallel import (
    Costs,
    Offload,
    Split,
    SplitMemory,
    Traffic,
    costs_of,
    divisors,
    impossible,
    limits_of,
    split_memory,
    traffic,
)
from easyllm.plan.published import Stage, bubble

RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
MICRO_BATCHES = (1, 2, 4, 8, 16)
STEP_TOKENS = 2**20
"""Tokens per optimizer step if no batch is given: of the order that models of billions use."""
HIDDEN_SHARE = 2 / 3
"""Share of the matrix products that gradients' traffic overlaps with: the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of an optimizer step.

    Attributes:
        compute: matrix products, recomputation included.
        bubble: idle time of the pipeline.
        tensor: traffic of tensor parallelism.
        data: traffic of gradients and gathered weights that computing does not hide.
        pipeline: traffic between stages.
    """

    compute: float
    bubble: float
    tensor: float
    data: float
    pipeline: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.compute + self.bubble + self.tensor + self.data + self.pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A split with its costs.

    Attributes:
        split: the split.
        memory: memory of the fullest device.
        traffic: bytes that each device sends per step.
        time: seconds of a step.
        tokens: tokens of a step.
        model_flops, hardware_flops: FLOPs of a step, without and with recomputation.
        hardware: the devices.
    """

    split: Split
    memory: SplitMemory
    traffic: Traffic
    time: StepTime
    tokens: int
    model_flops: int
    hardware_flops: int
    hardware: Hardware

    @property
    def fits(self) -> bool:
        """Whether the memory of a device suffices."""
        return self.memory.total <= self.hardware.usable_bytes

    @property
    def tokens_per_s(self) -> float:
        """Throughput of all devices."""
        return self.tokens / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation."""
        return self.model_flops / (self.time.total * self.split.gpus * self.hardware.flops_per_s)

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation, which counts recomputation."""
        return self.mfu * self.hardware_flops / self.model_flops

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        split = self.split
        time = {name: getattr(self.time, name) for name in StepTime.__dataclass_fields__}
        return {
            "name": split.name,
            "data": split.data,
            "tensor": split.tensor,
            "pipeline": split.pipeline,
            "zero_stage": split.stage,
            "offload": split.offload,
            "recompute": split.recompute,
            "micro_batch": split.micro_batch,
            "memory_bytes": self.memory.as_dict(),
            "fits": self.fits,
            "sent_bytes": {
                "data": round(self.traffic.data),
                "tensor": round(self.traffic.tensor),
                "pipeline": round(self.traffic.pipeline),
            },
            "step_seconds": _rounded(self.time.total),
            "seconds": {name: _rounded(value) for name, value in time.items()},
            "tokens_per_s": round(self.tokens_per_s, 1),
            "mfu": round(self.mfu, 4),
            "hfu": round(self.hfu, 4),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """The result of a search.

    Attributes:
        fitting: the best way for each combination of degrees and ZeRO stage, fastest first.
        failing: the others that need too much memory, with the least memory that they need.
        refused: combinations that cannot be made, with the reason.
        batch: sequences per step.
    """

    fitting: tuple[Way, ...]
    failing: tuple[Way, ...]
    refused: dict[str, str]
    batch: int

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return {
            "batch": self.batch,
            "fitting": [way.as_dict() for way in self.fitting],
            "failing": [
                {
                    "name": way.split.name,
                    "needed_bytes": way.memory.total,
                    "missing_bytes": way.memory.total - way.hardware.usable_bytes,
                }
                for way in self.failing
            ],
            "refused": self.refused,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a search is restricted to; None leaves a value open.

    Attributes:
        batch: sequences per optimizer step.
        tensor, pipeline: parallel degrees.
        stage: ZeRO stage.
        recompute: recomputed activations.
        micro_batch: sequences per forward pass.
        offload: states in the memory of the host.
    """

    batch: int | None = None
    tensor: int | None = None
    pipeline: int | None = None
    stage: Stage | None = None
    recompute: Recompute | None = None
    micro_batch: int | None = None
    offload: Offload = "none"


def default_batch(gpus: int, context: int) -> int:
    """Returns sequences of about `STEP_TOKENS` tokens, a multiple of the number of GPUs."""
    return gpus * max(1, round(STEP_TOKENS / (context * gpus)))


def find_ways(
    config: ModelConfig,
    hardware: Hardware,
    gpus: int,
    *,
    context: int,
    wish: Wish | None = None,
) -> Search:
    """Tries every split of full training over `gpus` devices.

    Args:
        config: configuration of the model.
        hardware: the devices.
        gpus: their number.
        context: tokens per sequence.
        wish: values that are fixed.

    Raises:
        ConfigError: the fixed values allow no split; the message says which would do.
    """
    wish = wish or Wish()
    batch = wish.batch or default_batch(gpus, context)
    costs, limits = costs_of(config, context), limits_of(config)
    flops = {mode: training_flops(config, (context,), recompute=mode) for mode in RECOMPUTES}
    best: dict[tuple[int, int, Stage], Way] = {}
    refused: dict[str, str] = {}
    for split in _splits(config, hardware, gpus, wish):
        key = (split.tensor, split.pipeline, split.stage)
        reason = impossible(limits, split, batch)
        if reason is not None:
            refused.setdefault(replace(split, micro_batch=1).name, reason)
            continue
        way = weigh(costs, split, hardware, flops[split.recompute], batch)
        known = best.get(key)
        if known is None or _rank(way) < _rank(known):
            best[key] = way
    if not best:
        raise ConfigError(
            next(iter(refused.values()), None)
            or f"tensor={wish.tensor or 1} times pipeline={wish.pipeline or 1} does not divide "
            f"{gpus} GPUs; use degrees whose product is one of "
            f"{', '.join(map(str, divisors(gpus)))}"
        )
    made = {way.split.name for way in best.values()}
    fitting = sorted((way for way in best.values() if way.fits), key=_rank)
    failing = sorted((way for way in best.values() if not way.fits), key=_rank)
    return Search(
        fitting=tuple(fitting),
        failing=tuple(failing),
        refused={name: reason for name, reason in refused.items() if name not in made},
        batch=batch,
    )


def weigh(costs: Costs, split: Split, hardware: Hardware, flops: TrainingFlops, batch: int) -> Way:
    """Returns a split with its memory, traffic and time.

    Args:
        costs: costs of the model per sequence.
        split: the split.
        hardware: the devices.
        flops: FLOPs of one sequence, with the split's recomputation.
        batch: sequences per step.
    """
    micro_batches = batch // (split.data * split.micro_batch)
    sent = traffic(costs, split, micro_batches)
    rate = hardware.flops_per_s * hardware.utilisation * split.gpus
    compute = batch * flops.total / rate
    model_ranks = split.tensor * split.pipeline
    near = hardware.link_bytes_per_s
    far = near if split.gpus <= hardware.node_size else hardware.network_bytes_per_s
    # a node holds whole tensor parallel groups first, so that only data and stages cross nodes
    tensor = sent.tensor / (near if split.tensor <= hardware.node_size else far)
    data = sent.data / (far if split.data * model_ranks > hardware.node_size else near)
    time = StepTime(
        compute=compute,
        bubble=compute * bubble(split.pipeline, micro_batches, split.interleave),
        tensor=tensor,
        data=max(0.0, data - HIDDEN_SHARE * compute),
        pipeline=sent.pipeline / far,
    )
    return Way(
        split=split,
        memory=split_memory(costs, split),
        traffic=sent,
        time=time,
        tokens=batch * costs.context,
        model_flops=batch * flops.model,
        hardware_flops=batch * flops.total,
        hardware=hardware,
    )


def _splits(config: ModelConfig, hardware: Hardware, gpus: int, wish: Wish) -> Iterator[Split]:
    """Yields all splits that use `gpus` devices; tensor parallelism stays within a node."""
    open_tensor = [t for t in divisors(gpus) if t <= hardware.node_size]
    for tensor in [wish.tensor] if wish.tensor else open_tensor:
        stages = [p for p in divisors(gpus) if p <= config.num_layers]
        for pipeline in [wish.pipeline] if wish.pipeline else stages:
            if gpus % (tensor * pipeline):
                continue
            data = gpus // (tensor * pipeline)
            zero: tuple[Stage, ...] = (0, 1, 2, 3) if data > 1 else (0,)
            for stage in zero if wish.stage is None else (wish.stage,):
                for recompute in (wish.recompute,) if wish.recompute else RECOMPUTES:
                    for rows in (wish.micro_batch,) if wish.micro_batch else MICRO_BATCHES:
                        yield Split(
                            data=data,
                            tensor=tensor,
                            pipeline=pipeline,
                            stage=stage,
                            offload=wish.offload,
                            recompute=recompute,
                            micro_batch=rows,
                        )


def _rank(way: Way) -> tuple[bool, float, int]:
    """Orders ways: those that fit by time, then memory; the others by memory."""
    if way.fits:
        return False, float(f"{way.time.total:.4g}"), way.memory.total
    return True, float(way.memory.total), 0


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


__all__ = ["Search", "StepTime", "Way", "Wish", "default_batch", "find_ways", "weigh"]
