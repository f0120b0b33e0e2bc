"""How a mixture of experts is used: the load of each expert, and the loss without it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.core.errors import ConfigError
from easyllm.core.progress import Progress
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.nn.moe import MoE, Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertReport:
    """The use of the experts of one layer.

    Attributes:
        layer: number of the layer.
        load: share of all choices that each expert received; sums to 1.
        first: share of the first choices.
        entropy: entropy of the load, divided by that of an even one.
        together: for each expert, the one that it is most often chosen with; None for one choice.
        loss_nats: increase of the mean loss per token without each expert, in nats; None if it was
            not measured.
    """

    layer: int
    load: list[float]
    first: list[float]
    entropy: float
    together: list[int] | None
    loss_nats: list[float] | None


@torch.no_grad()
def probe_experts(
    model: Decoder, texts: Sequence[Sequence[int]], *, ablate: bool = True
) -> list[ExpertReport]:
    """Returns the use of each expert on texts.

    Args:
        model: a mixture of experts.
        texts: token ids of each text, at least two tokens each.
        ablate: whether each expert is removed in turn, which costs a pass over the texts each.

    Raises:
        ConfigError: the model has no experts.
    """
    layers = [(n, layer.feed_forward) for n, layer in enumerate(model.layers)]
    mixtures = [(n, moe) for n, moe in layers if isinstance(moe, MoE)]
    if not mixtures:
        raise ConfigError("the model has no experts; give a mixture of experts")
    routings: dict[int, list[Routing]] = {number: [] for number, _ in mixtures}
    before = _loss(model, texts, routings)
    reports = []
    total = sum(moe.config.num_experts for _, moe in mixtures) if ablate else 0
    with Progress("removing experts", total=total, unit="experts") as progress:
        for number, moe in mixtures:
            losses = list[float]()
            for expert in range(moe.config.num_experts) if ablate else ():
                with without_expert(moe, expert):
                    losses.append(_loss(model, texts) - before)
                progress.advance()
            reports.append(_report(number, routings[number], losses or None))
    return reports


@contextmanager
def without_expert(moe: MoE, expert: int) -> Iterator[None]:
    """Makes a mixture choose among the other experts, inside the context.

    Raises:
        ConfigError: too few experts would be left.
    """
    if moe.config.num_experts - 1 < moe.config.experts_per_token:
        raise ConfigError(
            f"without one of {moe.config.num_experts} experts, {moe.config.experts_per_token} "
            "cannot be chosen for a token"
        )
    route = moe.route

    def others(logits: Tensor) -> tuple[Tensor, Tensor]:
        return route(
            logits.index_fill(-1, torch.tensor([expert], device=logits.device), float("-inf"))
        )

    moe.route = others  # type: ignore[method-assign]
    try:
        yield
    finally:
        del moe.route


def _loss(
    model: Decoder, texts: Sequence[Sequence[int]], kept: dict[int, list[Routing]] | None = None
) -> float:
    """Returns the mean loss per token; records the routing of each layer in `kept`."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor(text, device=model.device)
        routing: list[Routing] = []
        context = ForwardContext.packed([len(ids)], device=model.device, routing=routing)
        logits = model.head(model(ids, context))[:-1]
        total += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
        if kept is not None:
            for each in routing:
                kept[each.layer].append(each)
    return total / max(1, count)


def _report(number: int, routings: Sequence[Routing], losses: list[float] | None) -> ExpertReport:
    chosen = torch.cat([routing.chosen for routing in routings])
    experts = routings[0].config.num_experts
    load = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
    first = torch.bincount(chosen[:, 0], minlength=experts) / len(chosen)
    used = load[load > 0]
    together = None
    if chosen.shape[1] > 1:
        hot = F.one_hot(chosen, experts).sum(1).float()
        pairs = hot.T @ hot
        together = pairs.fill_diagonal_(-1).argmax(-1).tolist()
    return ExpertReport(
        layer=number,
        load=load.tolist(),
        first=first.tolist(),
        entropy=float(-(used * used.log()).sum()) / math.log(experts) if experts > 1 else 1.0,
        together=together,
        loss_nats=losses,
    )


__all__ = ["ExpertReport", "probe_experts", "without_expert"]
