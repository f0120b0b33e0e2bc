"""Deterministic mode: batch-invariant results, bitwise independent of what else is computed, in training and serving alike.

A forward pass is told by its context (`ForwardContext.deterministic`): linears run over tiles of a fixed number of rows,
attention in one order of keys (`ops/deterministic`). The rest works row by row anyway.
"""

import torch

from easyllm.core.errors import ConfigError
from easyllm.nn.attention import Attention
from easyllm.nn.config import AttentionConfig, MoEConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Linear
from easyllm.ops.kernels import kernels_for

ROW_BY_ROW = frozenset({"silu", "relu"})
"""Activations that are the same whatever the number of rows: by a kernel of ours, and exactly."""
WHOLE_VECTORS = 64
"""Numbers PyTorch takes at once at most (bf16 with AVX-512, two vectors)."""


def check_deterministic(model: Decoder) -> None:
    """Refuses a model that cannot promise batch-invariant results.

    Raises:
        ConfigError: with the reason.
    """
    reason = deterministic_unsupported_reason(model)
    if reason is not None:
        raise ConfigError(f"this model has no deterministic mode: {reason}")


def deterministic_unsupported_reason(model: Decoder) -> str | None:
    """Why the mode cannot be promised; None if it can."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    if kernels_for(*weights) is None:
        return "it needs a CPU, weights of fp32 or bf16, and a C compiler"
    for name, holder in model.holders():
        if not holder.storage.batch_invariant:
            return f"{name} keeps its weight as {holder.storage.format}, whose products are not batch-invariant"
        adapter = holder.adapter if isinstance(holder, Linear) else None
        if adapter is not None and not adapter.batch_invariant:
            return f"{name} has an adapter whose products are not batch-invariant; merge it"
    for number, layer in enumerate(model.config.layers):
        mixer = layer.mixer
        forward = layer.feed_forward
        inner = forward.expert if isinstance(forward, MoEConfig) else forward
        if inner.activation not in ROW_BY_ROW and inner.intermediate_size % WHOLE_VECTORS:
            return (
                f"layer {number} has {inner.activation} over a width of {inner.intermediate_size}, which is not a "
                f"multiple of {WHOLE_VECTORS}: PyTorch computes the last numbers of a tensor differently"
            )
        if not isinstance(mixer, AttentionConfig):
            return f"layer {number} has linear attention, whose sums follow the length of a pass"
        attention = model.layers[number].mixer
        assert isinstance(attention, Attention), "built from this configuration"
        rule = attention.rule
        if not (rule.plain and rule.causal) or rule.num_sinks or mixer.head_dim % 16:
            return (
                f"layer {number} has attention with a soft cap, sinks, score positions ({mixer.position.kind}), a head_dim "
                "that is not a multiple of 16, or without a causal mask"
            )
    return None


def one_row_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """[N] log-probabilities in nats of `token_ids: [N]` under `logits: [N, V]`, a row at a time: the sum over the
    vocabulary is split among threads by the number of rows, and so would its bits be."""
    rows = [
        row.gather(1, token[None, None]).squeeze() - row.logsumexp(-1).squeeze()
        for row, token in zip(logits.split(1), token_ids, strict=True)
    ]
    return torch.stack(rows) if rows else logits.new_empty(0)


__all__ = ["check_deterministic", "deterministic_unsupported_reason", "one_row_logprobs"]
