"""Memory, communication and time of a training step that is split over several devices.

G = data · tensor · pipeline devices. Tensor parallelism divides every matrix by t (Megatron,
arXiv 1909.08053), sequence parallelism also the activations between them (arXiv 2205.05198),
pipeline parallelism gives each of p stages L/p layers (1F1B, arXiv 2104.04473), and the ZeRO stage
shards optimizer state (1), gradients (2) and weights (3) over the data parallel ranks (arXiv
1910.02054). Stage 3 is FSDP's FULL_SHARD, stage 2 its SHARD_GRAD_OP.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal

from easyllm.core.json_types import JsonObject
from easyllm.nn.config import AttentionConfig, GLUConfig, MLPConfig, ModelConfig
from easyllm.nn.cost import FP32, Event, SavedTensor, Work
from easyllm.nn.recompute import Recompute
from easyllm.plan.parts import layers_of, outside_of
from easyllm.plan.published import Stage
from easyllm.plan.trace import trace_model

Offload = Literal["none", "optimizer", "all"]
HALF = 2
K = 12
"""Bytes per parameter of Adam's state in mixed precision: fp32 master weight and two moments."""
LOGIT_BYTES = 2 * FP32
"""Bytes per logit: in fp32, and their gradient."""
SPLIT_NAMES = ("x", "mixer_norm", "feed_forward_norm", "mixed.", "fed", "hidden")
"""Beginnings of the names of activations as wide as the residual stream, which tensor parallelism
without sequence parallelism repeats on every rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a training step is divided over devices.

    Attributes:
        data, tensor, pipeline: parallel degrees.
        stage: ZeRO stage over the data parallel ranks.
        sequence_parallel: whether the activations between tensor parallel regions are divided, too.
        offload: states that are in the memory of the host.
        recompute: activations that the backward pass recomputes.
        micro_batch: sequences per forward pass of a data parallel rank.
        interleave: model chunks per pipeline stage.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    stage: Stage = 0
    sequence_parallel: bool = True
    offload: Offload = "none"
    recompute: Recompute = "none"
    micro_batch: int = 1
    interleave: int = 1

    @property
    def gpus(self) -> int:
        """Number of devices."""
        return self.data * self.tensor * self.pipeline

    @property
    def name(self) -> str:
        """The parallel degrees, such as `DP8 TP4 PP2 ZeRO-1`."""
        parts = [f"DP{self.data}"]
        parts += [f"TP{self.tensor}"] * (self.tensor > 1)
        parts += [f"PP{self.pipeline}"] * (self.pipeline > 1)
        parts += [f"ZeRO-{self.stage}"] * (self.stage > 0)
        return " ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitMemory:
    """Bytes on the device that holds most.

    Attributes:
        weights: half-precision weights.
        gradients: half-precision gradients.
        optimizer: fp32 master weights and moments.
        activations: saved for the backward pass, of all micro-batches in flight.
        logits: logits and their gradient of a micro-batch.
        workspace: weights gathered by ZeRO-3, or one layer's gradients of activations.
        host: states offloaded to the host, not counted in the total.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    host: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.workspace
        )

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a split needs to know of a model, per sequence of a given length.

    Attributes:
        layers: (elements of matrices, other elements) of each layer's trained parameters.
        tables: elements of the embedding, and of the untied head.
        tied: whether the head uses the embedding.
        split_bytes, whole_bytes: saved activations of a layer that tensor parallelism divides, and
            those as wide as the residual stream; the most of any layer.
        fed_bytes: of the split bytes, those of the feed-forward (selective recomputation).
        vocab, hidden, context: sizes.
    """

    layers: tuple[tuple[int, int], ...]
    tables: tuple[int, int]
    tied: bool
    split_bytes: int
    whole_bytes: int
    fed_bytes: int
    vocab: int
    hidden: int
    context: int


@lru_cache(maxsize=8)
def costs_of(config: ModelConfig, context: int) -> Costs:
    """Traces one sequence of `context` tokens in bf16."""
    layers = []
    for layer in layers_of(config):
        sizes = [(p.numel(), p.ndim > 1) for p in layer.parameters()]
        layers.append((sum(n for n, m in sizes if m), sum(n for n, m in sizes if not m)))
    trace = trace_model(config, Work(lengths=(context,), labelled=context))
    most = (0, 0, 0)
    for traced in trace.layers:
        split, whole = _divided(traced.events)
        most = max(most, (split, whole, _divided(traced.fed)[0]))
    extra = sum(p.numel() for module in outside_of(config) for p in module.parameters())
    table = config.vocab_size * config.hidden_size
    tied = config.tie_embeddings or config.num_labels is not None
    return Costs(
        layers=tuple(layers),
        tables=(table + extra, 0 if tied else table),
        tied=tied,
        split_bytes=most[0],
        whole_bytes=most[1],
        fed_bytes=most[2],
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        context=context,
    )


def _divided(events: Sequence[Event]) -> tuple[int, int]:
    """Returns the saved bytes that tensor parallelism divides, and those that it repeats."""
    found = {e.name: e.nbytes for e in events if isinstance(e, SavedTensor)}
    whole = sum(size for name, size in found.items() if name.startswith(SPLIT_NAMES))
    return sum(found.values()) - whole, whole


def stage_parameters(costs: Costs, split: Split) -> int:
    """Returns the parameters of a model-parallel rank of the pipeline stage that has most."""
    t, stages = split.tensor, split.pipeline
    size = len(costs.layers) // stages
    table, head = (-(-n // t) for n in costs.tables)
    most = 0
    for first in range(0, len(costs.layers), size):
        inside = costs.layers[first : first + size]
        count = sum(-(-matrices // t) + rest for matrices, rest in inside)
        if first == 0:
            count += table
        if first + size >= len(costs.layers):
            count += head or table * (stages > 1)  # a tied embedding is on both ends
        most = max(most, count)
    return most


def split_memory(costs: Costs, split: Split) -> SplitMemory:
    """Returns the memory of full training with Adam in mixed precision, on the fullest device.

    Gradients of ZeRO-2 and 3 are reduced and freed layer by layer; offloaded states leave the
    device.
    """
    own, d = stage_parameters(costs, split), split.data
    weights = own * HALF // (d if split.stage == 3 else 1)
    gradients = own * HALF // (d if split.stage >= 2 else 1)
    optimizer = own * K // (d if split.stage >= 1 else 1)
    host = 0
    if split.offload != "none":
        host, optimizer = optimizer, 0
    if split.offload == "all":
        host, weights, gradients = host + weights + gradients, 0, 0
    activations, layer = _activations(costs, split)
    gathered = 0
    if split.stage == 3 and d > 1:  # the weights of this layer and of the next, prefetched
        largest = max(sum(each) for each in costs.layers)
        gathered = 2 * HALF * max(largest, *costs.tables) // split.tensor
    rows = split.micro_batch * costs.context
    return SplitMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=rows * -(-costs.vocab // split.tensor) * LOGIT_BYTES,
        workspace=gathered + layer,
        host=host,
    )


def _activations(costs: Costs, split: Split) -> tuple[int, int]:
    """Returns the saved activations of all micro-batches in flight, and a layer's workspace."""
    t = split.tensor
    whole = costs.whole_bytes // (t if split.sequence_parallel else 1)
    layer = costs.split_bytes // t + whole
    residual = costs.context * costs.hidden * HALF // (t if split.sequence_parallel else 1)
    match split.recompute:
        case "none":
            kept = layer
        case "selective":
            kept = layer - costs.fed_bytes // t + residual
        case "full":
            kept = residual
    layers = len(costs.layers)  # the first stage holds p micro-batches of L/p layers
    more = (
        (split.pipeline - 1) / (split.pipeline * split.interleave) if split.interleave > 1 else 0.0
    )
    b = split.micro_batch
    return int(b * kept * layers * (1 + more)), b * (layer - kept) + 2 * b * residual


# ---- communication


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that each device sends in a training step.

    Attributes:
        data: gradients, and with ZeRO-3 the gathered weights of every micro-batch.
        tensor: activations inside the layers.
        pipeline: activations and their gradients between stages.
    """

    data: float
    tensor: float
    pipeline: float

    @property
    def total(self) -> float:
        """Sum of all kinds."""
        return self.data + self.tensor + self.pipeline


def traffic(costs: Costs, split: Split, micro_batches: int) -> Traffic:
    """Returns what each device sends in a step of `micro_batches` forward passes.

    Data parallel: 2Ψ elements, or with ZeRO-3 two gathers of Ψ per micro-batch and one reduction.
    Tensor parallel: 4 all-reduces of [b·s, h] per layer (6 if whole layers are recomputed), each
    2(t − 1)/t of its size; sequence parallelism sends the same. Pipeline: b·s·h each way.
    """
    own, d, t = stage_parameters(costs, split), split.data, split.tensor
    passes = 2 * micro_batches + 1 if split.stage == 3 else 2
    data = passes * own * HALF * (d - 1) / d
    hidden = split.micro_batch * costs.context * costs.hidden * HALF
    reduces = 6 if split.recompute == "full" else 4
    layers = len(costs.layers) / split.pipeline
    tensor = micro_batches * layers * reduces * 2 * (t - 1) / t * hidden
    steps = 2 * micro_batches * split.interleave * (split.pipeline > 1)
    return Traffic(data=data, tensor=tensor, pipeline=steps * hidden / t)


# ---- what is possible


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes of a model that parallel degrees have to divide.

    Attributes:
        layers: number of layers.
        widths: name and size of what tensor parallelism divides.
    """

    layers: int
    widths: tuple[tuple[str, int], ...]


def limits_of(config: ModelConfig) -> Limits:
    """Returns the sizes that parallel degrees have to divide."""
    return Limits(layers=config.num_layers, widths=tuple(dict.fromkeys(_widths(config))))


def impossible(limits: Limits, split: Split, batch: int) -> str | None:
    """Returns why a split cannot be made and what would do; None if it can.

    Args:
        limits: sizes of the model.
        split: the split.
        batch: sequences per optimizer step.
    """
    layers, t = limits.layers, split.tensor
    if layers % (split.pipeline * split.interleave):
        return (
            f"{layers} layers do not divide into {split.pipeline * split.interleave} stages; "
            f"pipeline degrees that do: {_listed(divisors(layers))}"
        )
    for what, size in limits.widths:
        if size % t and not (what == "KV heads" and t % size == 0):
            return f"{size} {what} are not divisible by tensor={t}; use {_listed(divisors(size))}"
    if split.pipeline > 1 and split.stage >= 2:
        return "ZeRO-2 and 3 free gradients that a pipeline accumulates; use ZeRO-1 with a pipeline"
    rows = split.data * split.micro_batch
    if batch % rows:
        return (
            f"a batch of {batch} sequences is not divisible by data={split.data} times "
            f"micro-batches of {split.micro_batch}; use {_listed(divisors(batch))} as their product"
        )
    return None


def divisors(number: int) -> list[int]:
    """Returns all divisors, in ascending order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _listed(numbers: list[int]) -> str:
    shown = [str(n) for n in numbers[:12]]
    return ", ".join(shown) + (" ..." if len(numbers) > 12 else "")


def _widths(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Yields the sizes that tensor parallelism divides."""
    for layer in dict.fromkeys(config.layers):
        if isinstance(layer.mixer, AttentionConfig):
            yield "attention heads", layer.mixer.num_heads
            yield "KV heads", layer.mixer.num_kv_heads
        if isinstance(layer.feed_forward, GLUConfig | MLPConfig):
            yield "feed-forward channels", layer.feed_forward.intermediate_size


__all__ = [
    "Costs",
    "Limits",
    "Offload",
    "Split",
    "SplitMemory",
    "Traffic",
    "costs_of",
    "divisors",
    "impossible",
    "limits_of",
    "split_memory",
    "stage_parameters",
    "traffic",
]
