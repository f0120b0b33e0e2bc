"""Mixture of experts (MoE): a router sends each token to a few feed-forwards."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from easyllm.nn.config import MoEConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.cost import FP32, INT64, Activation, CostTrace
from easyllm.nn.gates import build_gate
from easyllm.nn.glu import GLU
from easyllm.nn.linear import Linear

ROUTERS = ("router", "shared_gate", "gate", "noise")
"""Names of the linears that select or gate experts: small, but decisive for the result."""


@dataclass(frozen=True, slots=True)
class Routing:
    """The routing of a batch in one layer.

    Attributes:
        layer: the layer's number.
        config: the layer's experts.
        logits: [T, E] fp32, with gradient.
        chosen: [T, k] int64, the experts of each token, best first.
        dropped: [T, k] bool, choices that exceeded the capacity of their expert.
    """

    layer: int
    config: MoEConfig
    logits: Tensor
    chosen: Tensor
    dropped: Tensor

    def load(self) -> Tensor:
        """Returns the share of all choices that each expert received, [E]; sums to 1."""
        counts = torch.bincount(self.chosen.flatten(), minlength=self.logits.shape[1])
        return counts / self.chosen.numel()


def load_balancing_loss(routing: Routing) -> Tensor:
    """Returns the load-balancing loss E Σ_i f_i P_i (arXiv 2101.03961, eqs. 4-6).

    f_i is the share of tokens routed to expert i and P_i its mean probability. With k experts per
    token f sums to k, so uniform routing gives k, as in HF.
    """
    if routing.config.routing == "sigmoid_topk":  # arXiv 2412.19437, eq. 19
        scores = routing.logits.sigmoid()
        probabilities = (scores / scores.sum(-1, keepdim=True)).mean(0)
    else:
        probabilities = routing.logits.softmax(-1).mean(0)
    share = routing.load() * routing.config.experts_per_token
    return routing.logits.shape[1] * (share * probabilities).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """Returns the mean over tokens of logsumexp(logits)² (arXiv 2202.08906, eq. 5)."""
    return routing.logits.logsumexp(-1).square().mean()


class MoE(nn.Module):
    """The sum of weight · expert(x) over a token's selected experts, plus the shared expert.

    The router runs in fp32. Tokens are sorted by expert, and each expert runs once over all of its
    tokens.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.router = Linear(hidden_size, config.num_experts)
        self.gate = build_gate(config.gate, hidden_size, config.num_experts)
        self.experts = nn.ModuleList(
            GLU(config.expert, hidden_size) for _ in range(config.num_experts)
        )
        self.shared = GLU(config.shared, hidden_size) if config.shared else None
        self.shared_gate = Linear(hidden_size, 1) if config.shared_gate else None
        bias = torch.empty(config.num_experts, dtype=torch.float32)
        self.register_buffer("selection_bias", bias if config.selection_bias else None)
        self.selection_bias: Tensor | None  # without a gradient, fp32

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the module; the bias of the selection keeps its dtype, as in DeepSeek-V3's code."""
        before = self.selection_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and self.selection_bias is not None and not before.is_meta:
            self.selection_bias = before.to(self.selection_bias.device)
        return self

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:  # noqa: ARG002
        """Sets the bias of the selection to zero."""
        if self.selection_bias is not None:
            self.selection_bias.zero_()

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Returns the output [T, D] for `x: [T, D]`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = self.router.wide(x.to(wide), context)  # [T, E]
        weights, chosen = self.route(self.gate.disturbed(logits, x.to(wide), context))
        dropped = self._overflow(chosen, self.gate.skipped(weights))
        if context.routing is not None:
            context.routing.append(Routing(self.layer, self.config, logits, chosen, dropped))
        out = self._run_experts(x, weights.masked_fill(dropped, 0.0), chosen, dropped, context)
        if self.shared is not None:
            shared = self.shared(x, context)
            if self.shared_gate is not None:
                shared = shared * self.shared_gate(x, context).sigmoid()
            out = out + shared
        return out

    def cost(self, trace: CostTrace, x: Activation) -> Activation:
        """Records the router in fp32, the experts over sorted rows, and the weighted sum."""
        work, config, width = trace.work, self.config, self.router.in_features
        tokens, choices = work.tokens, work.tokens * config.experts_per_token
        wide = Activation(
            x.name if work.itemsize == FP32 else "x.wide", tokens * width * FP32, x.grad
        )
        logits = trace.linear(self.router, "router", wide, part="router")
        self.gate.cost(trace, wide)
        rows = self._routed_rows(tokens)
        if logits.grad:
            self._routing_cost(trace, width, rows)
        parts = trace.made("parts", width, grad=x.grad, rows=rows)
        out = trace.of(
            self.experts[0], parts, rows=rows, copies=config.num_experts, prefix="expert."
        )
        if out.grad:
            trace.keep("scale", choices * work.itemsize)
            trace.keep("place", choices * INT64)
            if logits.grad:
                trace.keep_all(trace.made("returned", width, grad=True, rows=choices))
        if self.shared is not None:
            self._shared_cost(trace, self.shared, x)
        return trace.made("fed", width, grad=out.grad)

    def _routed_rows(self, tokens: int) -> int:
        """Total number of rows of all experts; with a capacity factor, an upper bound."""
        config, rows = self.config, tokens * self.config.experts_per_token
        if config.capacity_factor is None:
            return rows
        capacity = max(1, int(rows / config.num_experts * config.capacity_factor))
        return min(rows, config.num_experts * capacity)

    def _routing_cost(self, trace: CostTrace, width: int, rows: int) -> None:
        """Records the probabilities, the selected experts and the order of rows."""
        work, config, k = trace.work, self.config, self.config.experts_per_token
        tokens = work.tokens
        if work.itemsize != FP32:
            trace.keep("router.weight.wide", config.num_experts * width * FP32)
        if config.routing != "topk_softmax":
            trace.keep("probabilities", tokens * config.num_experts * FP32)
            if config.normalise:
                trace.keep("chosen weights", tokens * (k + 1) * FP32)
        else:
            trace.keep("chosen weights", tokens * k * FP32)
        trace.keep("chosen", tokens * k * INT64)
        trace.keep("dropped", tokens * k)
        trace.keep("order", rows * INT64)

    def _shared_cost(self, trace: CostTrace, shared: GLU, x: Activation) -> None:
        out = shared.cost(trace, x, prefix="shared.")
        if self.shared_gate is None:
            return
        gate = trace.linear(self.shared_gate, "shared_gate", x, part="router")
        if gate.grad:
            trace.keep_all(out)
        if out.grad:
            trace.keep_all(Activation("shared.sigmoid", gate.nbytes, gate.grad))

    def inner_elements(self, rows: int) -> int:
        """Returns the elements of the widest live tensors, those of the selected experts."""
        expert = self.experts[0]
        assert isinstance(expert, GLU)
        return expert.inner_elements(rows * self.config.experts_per_token)

    @property
    def inactive_experts(self) -> int:
        """Number of experts that do not process a given token."""
        return self.config.num_experts - self.config.experts_per_token

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the weights and the indices of each token's experts, both [T, k]."""
        k = self.config.experts_per_token
        if self.config.routing == "topk_softmax":
            best, chosen = logits.topk(k, dim=-1)
            return best.softmax(-1) * self.config.scale, chosen
        sigmoid = self.config.routing == "sigmoid_topk"
        scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
        if self.selection_bias is None and self.config.num_groups == 1:
            weights, chosen = scores.topk(k, dim=-1)
        else:
            chosen = self._selection_scores(scores.detach()).topk(k, dim=-1).indices
            weights = scores.gather(1, chosen)
        if self.config.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.config.scale, chosen

    def _selection_scores(self, scores: Tensor) -> Tensor:
        """Returns the scores [T, E] by which experts are selected: -∞ outside the best groups."""
        config = self.config
        if self.selection_bias is not None:
            scores = scores + self.selection_bias.to(scores.dtype)
        if config.num_groups == 1:
            return scores
        grouped = scores.unflatten(1, (config.num_groups, -1))  # [T, groups, E / groups]
        best = grouped.topk(2 if config.group_score == "best_two" else 1, dim=-1).values.sum(-1)
        chosen = best.topk(config.groups_per_token, dim=-1).indices
        hidden = torch.ones_like(best, dtype=torch.bool).scatter(1, chosen, False)
        found: Tensor = grouped.masked_fill(hidden[..., None], float("-inf")).flatten(1)
        return found

    def _overflow(self, chosen: Tensor, skipped: Tensor | None = None) -> Tensor:
        """Choices that are not made, or exceed an expert's capacity, [T, k] bool.

        First choices take priority, then earlier tokens (Lepikhin et al. 2020, arXiv 2006.16668,
        algorithm 1).
        """
        factor = self.config.capacity_factor
        if factor is None or not self.training:
            return torch.zeros_like(chosen, dtype=torch.bool) if skipped is None else skipped
        num_tokens, k = chosen.shape
        capacity = max(1, int(num_tokens * k / self.config.num_experts * factor))
        by_rank = nn.functional.one_hot(chosen.T.flatten(), self.config.num_experts)
        if skipped is not None:  # they take no place
            by_rank = by_rank * (~skipped).T.flatten()[:, None]
        place = (by_rank.cumsum(0) * by_rank).sum(-1)  # 1 for an expert's first token
        dropped = (place > capacity).view(k, num_tokens).T
        return dropped if skipped is None else dropped | skipped

    def _run_experts(
        self,
        x: Tensor,
        weights: Tensor,
        chosen: Tensor,
        dropped: Tensor,
        context: ForwardContext,
    ) -> Tensor:
        """Returns Σ_j weight_tj · expert_tj(x_t); rows are gathered before and after."""
        num_experts, k = self.config.num_experts, self.config.experts_per_token
        flat = chosen.masked_fill(dropped, num_experts).flatten()  # dropped choices sort last
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=num_experts + 1).tolist()
        lost = counts.pop()
        sources = order[: len(order) - lost] // k  # the tokens of the sorted rows
        parts = x.index_select(0, sources).split(counts)
        contexts = [context.of_rows(rows) for rows in sources.split(counts)]
        each = zip(self.experts, parts, contexts, strict=True)
        outs = [expert(part, its) for expert, part, its in each if len(part)]
        if lost:
            outs.append(x.new_zeros(lost, x.shape[1]))
        place = torch.empty_like(order)  # index of each choice among the sorted rows
        place[order] = torch.arange(len(order), device=order.device)
        rows = torch.cat(outs).index_select(0, place).view(*chosen.shape, -1)  # [T, k, D]
        out: Tensor = torch.bmm(weights.to(x.dtype)[:, None], rows).squeeze(1)
        return out
