"""FLOPs of inference and training, by component; a multiply-add counts as 2.

Products are counted and nothing else: norms, activations, softmax and the optimizer are memory traffic, not arithmetic.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

from easyllm.adapters import AdapterConfig
from easyllm.core.errors import ConfigError
from easyllm.nn.config import ModelConfig
from easyllm.nn.cost import LayerTrace, Product, Work, computed_again
from easyllm.nn.pairs import Counting
from easyllm.nn.recompute import Recompute
from easyllm.plan.parts import layers_of, mixer_of
from easyllm.plan.trace import trace_model

USUAL_MFU = 0.45
"""Share of the machine's rate a training run of ours reaches, for estimates of its time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """FLOPs of each component, all layers together.

    Attributes:
        attention: projections of the mixers.
        scores: products of queries with keys and of weights with values.
        feed_forward: experts a token passes, and dense feed-forwards.
        router: of mixtures of experts.
        head: the output projection.
        adapters: the thin matrices of LoRA.
    """

    attention: int = 0
    scores: int = 0
    feed_forward: int = 0
    router: int = 0
    head: int = 0
    adapters: int = 0

    @property
    def total(self) -> int:
        return self.linears + self.scores

    @property
    def linears(self) -> int:
        """All products with a weight."""
        parts = (self.attention, self.feed_forward, self.router, self.head, self.adapters)
        return sum(parts)

    @property
    def scores_share(self) -> float:
        """Share of the layers' FLOPs that grows with the square of the length."""
        return self.scores / (self.total - self.head)

    def __add__(self, other: "Flops") -> "Flops":
        names = [field.name for field in fields(self)]
        return Flops(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def as_dict(self) -> dict[str, int]:
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFlops:
    """FLOPs of a training step's passes.

    Attributes:
        recomputed: of the second forward pass that activation checkpointing makes.
    """

    forward: Flops
    backward: Flops
    recomputed: Flops

    @property
    def model(self) -> int:
        """What the gradients cost however they are computed: the FLOPs of MFU."""
        return self.forward.total + self.backward.total

    @property
    def total(self) -> int:
        """What the hardware does: the FLOPs of HFU."""
        return self.model + self.recomputed.total

    def as_dict(self) -> dict[str, object]:
        passes = {name: getattr(self, name).as_dict() for name in ("forward", "backward")}
        recomputed = {"recomputed": self.recomputed.as_dict()}
        return passes | recomputed | {"model": self.model, "total": self.total}


def forward_flops(
    config: ModelConfig,
    lengths: Sequence[int],
    *,
    counting: Counting = "causal",
    head_rows: int | None = None,
) -> Flops:
    """FLOPs of a forward pass over packed sequences of these lengths.

    Args:
        counting: `causal` counts the pairs of tokens the mask lets through, `full` all n² of a sequence.
        head_rows: rows that pass the head, by default all (a prefill needs one a sequence).
    """
    tokens = sum(lengths)
    work = Work(
        lengths=tuple(lengths),
        labelled=tokens if head_rows is None else head_rows,
        counting=counting,
    )
    trace = trace_model(config, work)
    products = [p for layer in trace.layers for p in _products(layer)]
    return _sum((p.part, p.forward) for p in [*products, trace.head])


def decode_flops(config: ModelConfig, context: int) -> Flops:
    """FLOPs of one more token of a sequence, the last of `context` tokens, with earlier keys and values in a cache."""
    alone = forward_flops(config, [1], counting="full")
    extra = sum(mixer_of(layer).cached_flops(context) for layer in layers_of(config))
    return alone + Flops(scores=extra)


def training_flops(
    config: ModelConfig,
    lengths: Sequence[int],
    *,
    counting: Counting = "causal",
    labelled: int | None = None,
    adapter: AdapterConfig | None = None,
    recompute: Recompute = "none",
    input_grad: bool | None = None,
) -> TrainingFlops:
    """FLOPs of the forward and backward pass over packed sequences of these lengths.

    Args:
        counting: as in `forward_flops`.
        labelled: tokens that carry a loss; by default all.
        adapter: trained instead of the model: a frozen product's backward pass is ∂x only.
        recompute: activations computed again in the backward pass.
        input_grad: whether what enters the first layer's products has a gradient; by default it has where the model is
            trained, its embedding and first norm with it, and has not for adapters.

    Raises:
        ConfigError: the adapter does not fit the model.
    """
    work = Work(
        lengths=tuple(lengths),
        labelled=sum(lengths) if labelled is None else labelled,
        counting=counting,
        trains_all=adapter is None,
        input_grad=adapter is None if input_grad is None else input_grad,
    )
    trace = trace_model(config, work, adapter)
    products = [p for layer in trace.layers for p in _products(layer)] + [trace.head]
    again = [p for layer in trace.layers for p in _computed_again(layer, recompute)]
    return TrainingFlops(
        forward=_sum((p.part, p.forward) for p in products),
        backward=_sum((p.part, p.backward) for p in products),
        recomputed=_sum((p.part, p.forward) for p in again),
    )


def mfu(tokens_per_s: float, flops_per_token: float, peak_flops_per_s: float) -> float:
    """Model FLOPs utilisation: the share of the peak that a rate of training amounts to (arXiv 2204.02311, appendix B).

    With hardware FLOPs (recomputation included) it is HFU.
    """
    return tokens_per_s * flops_per_token / peak_flops_per_s


def estimate_time(flops: float, flops_per_s: float, *, utilisation: float = 1.0) -> float:
    """Seconds that so many FLOPs take at a share of a rate.

    Raises:
        ConfigError: the rate or the share is not positive.
    """
    if flops_per_s <= 0 or not 0 < utilisation <= 1:
        raise ConfigError(
            f"a rate of {flops_per_s:g} FLOP/s at utilisation {utilisation:g} gives no time; "
            "the rate must be above 0, the utilisation above 0 and at most 1"
        )
    return flops / (flops_per_s * utilisation)


def _products(layer: LayerTrace) -> list[Product]:
    return [event for event in layer.events if isinstance(event, Product)]


def _computed_again(layer: LayerTrace, recompute: Recompute) -> list[Product]:
    match recompute:
        case "none":
            return []
        case "selective":
            return computed_again(layer.fed)
        case "full":
            return computed_again(layer.events)


def _sum(parts: Iterable[tuple[str, int]]) -> Flops:
    total: dict[str, int] = {}
    for part, flops in parts:
        total[part] = total.get(part, 0) + flops
    return Flops(**total)
