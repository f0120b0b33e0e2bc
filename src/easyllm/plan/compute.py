"""FLOPs of inference and training, by component; a multiply-add counts as 2.

Only matrix products (GEMM) are counted: norms, activations, softmax and the optimizer are
memory-bound.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

from easyllm.adapters import AdapterConfig
from easyllm.core.errors import ConfigError
from easyllm.nn.config import ModelConfig
from easyllm.nn.cost import Gemm, LayerTrace, Work, recomputed_gemms
from easyllm.nn.pairs import Counting
from easyllm.nn.recompute import Recompute
from easyllm.plan.parts import layers_of, mixer_of
from easyllm.plan.trace import trace_model

USUAL_MFU = 0.45
"""Model FLOPs utilisation that training runs typically reach here, for estimates of time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """FLOPs of each component, summed over all layers.

    Attributes:
        attention: projections of the mixers.
        scores: attention scores (queries times keys) and attention weights times values.
        feed_forward: dense feed-forwards, and the experts that a token is routed to.
        router: routers of mixtures of experts.
        head: the output projection.
        adapters: matrix products of adapters: low-rank matrices, encoders of virtual tokens.
    """

    attention: int = 0
    scores: int = 0
    feed_forward: int = 0
    router: int = 0
    head: int = 0
    adapters: int = 0

    @property
    def total(self) -> int:
        """FLOPs of all components."""
        return self.linears + self.scores

    @property
    def linears(self) -> int:
        """FLOPs of all matrix products with a weight."""
        parts = (self.attention, self.feed_forward, self.router, self.head, self.adapters)
        return sum(parts)

    @property
    def scores_share(self) -> float:
        """Share of the layers' FLOPs that is quadratic in the sequence length."""
        return self.scores / (self.total - self.head)

    def __add__(self, other: "Flops") -> "Flops":
        names = [field.name for field in fields(self)]
        return Flops(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def as_dict(self) -> dict[str, int]:
        """Returns plain values for JSON."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFlops:
    """FLOPs of a training step by pass.

    Attributes:
        forward: the forward pass.
        backward: the backward pass.
        recomputed: the second forward pass that activation checkpointing requires.
    """

    forward: Flops
    backward: Flops
    recomputed: Flops

    @property
    def model(self) -> int:
        """FLOPs that the gradients require without recomputation, as counted by MFU."""
        return self.forward.total + self.backward.total

    @property
    def total(self) -> int:
        """FLOPs that the hardware executes, as counted by HFU."""
        return self.model + self.recomputed.total

    def as_dict(self) -> dict[str, object]:
        """Returns plain values for JSON."""
        passes = {name: getattr(self, name).as_dict() for name in ("forward", "backward")}
        recomputed = {"recomputed": self.recomputed.as_dict()}
        return passes | recomputed | {"model": self.model, "total": self.total}


def forward_flops(
    config: ModelConfig,
    lengths: Sequence[int],
    *,
    counting: Counting = "causal",
    head_rows: int | None = None,
    prefixes: Sequence[int] | None = None,
) -> Flops:
    """Returns the FLOPs of a forward pass over packed sequences of these lengths.

    Args:
        counting: `causal` counts the unmasked pairs of tokens, `full` all n² pairs of a sequence.
        head_rows: rows for which logits are computed; defaults to all (a prefill needs one per
            sequence).
        prefixes: as in `training_flops`.
    """
    tokens = sum(lengths)
    work = Work(
        lengths=tuple(lengths),
        labelled=tokens if head_rows is None else head_rows,
        counting=counting,
        prefixes=_prefixes(config, prefixes),
    )
    trace = trace_model(config, work)
    products = [p for layer in trace.layers for p in _products(layer)]
    return _sum((p.part, p.forward) for p in [*products, trace.head])


def decode_flops(config: ModelConfig, context: int) -> Flops:
    """Returns the FLOPs of decoding one token, the last of `context`, with a KV cache."""
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
    prefixes: Sequence[int] | None = None,
) -> TrainingFlops:
    """Returns the FLOPs of the forward and backward pass over packed sequences.

    Args:
        lengths: tokens of each sequence.
        counting: as in `forward_flops`.
        labelled: number of tokens with a loss; defaults to all.
        adapter: adapter that is trained instead of the model; the backward pass of a frozen linear
            computes only ∂x.
        recompute: activations that gradient checkpointing recomputes in the backward pass.
        input_grad: whether the inputs of the first layer's linears need a gradient. By default they
            do if the model is trained, because its embedding and first norm are, and do not for
            adapters.
        prefixes: tokens of each sequence that the encoder of an encoder–decoder reads; without
            them every token counts in both stacks.

    Raises:
        ConfigError: the adapter does not fit the model.
    """
    work = Work(
        lengths=tuple(lengths),
        labelled=sum(lengths) if labelled is None else labelled,
        counting=counting,
        trains_all=adapter is None,
        input_grad=adapter is None if input_grad is None else input_grad,
        prefixes=_prefixes(config, prefixes),
    )
    trace = trace_model(config, work, adapter)
    products = [p for layer in trace.layers for p in _products(layer)]
    products += [*trace.adapter, trace.head]
    again = [p for layer in trace.layers for p in _computed_again(layer, recompute)]
    return TrainingFlops(
        forward=_sum((p.part, p.forward) for p in products),
        backward=_sum((p.part, p.backward) for p in products),
        recomputed=_sum((p.part, p.forward) for p in again),
    )


def mfu(tokens_per_s: float, flops_per_token: float, peak_flops_per_s: float) -> float:
    """Returns the model FLOPs utilisation (MFU) of a training run (arXiv 2204.02311, appendix B).

    It is the throughput as a share of the peak. With hardware FLOPs, which include recomputation,
    the result is the hardware FLOPs utilisation (HFU).

    Args:
        tokens_per_s: training throughput.
        flops_per_token: model FLOPs per token, forward and backward.
        peak_flops_per_s: peak FLOP/s of the hardware.
    """
    return tokens_per_s * flops_per_token / peak_flops_per_s


def estimate_time(flops: float, flops_per_s: float, *, utilisation: float = 1.0) -> float:
    """Returns the seconds that `flops` take at a rate of `flops_per_s` and a given utilisation.

    Raises:
        ConfigError: the rate is not positive, or the utilisation is not between 0 and 1.
    """
    if flops_per_s <= 0 or not 0 < utilisation <= 1:
        raise ConfigError(
            f"cannot estimate a time from {flops_per_s:g} FLOP/s at utilisation {utilisation:g}; "
            "the rate must be above 0, the utilisation above 0 and at most 1"
        )
    return flops / (flops_per_s * utilisation)


def _prefixes(config: ModelConfig, prefixes: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if prefixes is None or config.encoder is None else tuple(prefixes)


def _products(layer: LayerTrace) -> list[Gemm]:
    return [event for event in layer.events if isinstance(event, Gemm)]


def _computed_again(layer: LayerTrace, recompute: Recompute) -> list[Gemm]:
    match recompute:
        case "none":
            return []
        case "selective":
            return recomputed_gemms(layer.fed)
        case "full":
            return recomputed_gemms(layer.events)


def _sum(parts: Iterable[tuple[str, int]]) -> Flops:
    total: dict[str, int] = {}
    for part, flops in parts:
        total[part] = total.get(part, 0) + flops
    return Flops(**total)
