"""Deterministic mode: a sequence's bits do not depend on what else is computed with it, in training and serving alike.

The mode is a property of a model's modules, set once: linears run over tiles of a fixed number of rows, attention in one
order of keys (`ops/deterministic`). The rest works row by row anyway.
"""

import torch
from torch import nn

from easyllm.core.errors import ConfigError
from easyllm.nn.attention import Attention
from easyllm.nn.config import AttentionConfig, MoEConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Embedding, Linear
from easyllm.ops.kernels import kernels_for

ROW_BY_ROW = frozenset({"silu", "relu"})
"""Activations that are the same whatever the number of rows: by a kernel of ours, and exactly."""
WHOLE_VECTORS = 64
"""Numbers PyTorch takes at once at most (bf16 with AVX-512, two vectors)."""


def set_deterministic(model: Decoder, on: bool = True) -> Decoder:
    """Switches the mode for every later forward pass; returns the model.

    Raises:
        ConfigError: the model cannot promise it; nothing is changed then.
    """
    refusal = deterministic_refusal(model) if on else None
    if refusal is not None:
        raise ConfigError(f"this model has no deterministic mode: {refusal}")
    for module in model.modules():
        if isinstance(module, Linear | Embedding | Attention):
            module.deterministic = on
    return model


def deterministic_refusal(model: Decoder) -> str | None:
    """Why the mode cannot be promised; None if it can."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    if kernels_for(*weights) is None:
        return "it needs a CPU, weights of fp32 or bf16, and a C compiler"
    for number, layer in enumerate(model.config.layers):
        mixer = layer.mixer
        forward = layer.feed_forward
        inner = forward.expert if isinstance(forward, MoEConfig) else forward
        if inner.activation not in ROW_BY_ROW and inner.intermediate_size % WHOLE_VECTORS:
            return (
                f"layer {number} has {inner.activation} over a width of {inner.intermediate_size}, no multiple of "
                f"{WHOLE_VECTORS}: PyTorch computes the last numbers of a tensor otherwise"
            )
        if not isinstance(mixer, AttentionConfig):
            return f"layer {number} has linear attention, whose sums follow the length of a pass"
        attention = model.layers[number].mixer
        assert isinstance(attention, Attention), "built from this configuration"
        rule = attention.rule
        if not (rule.plain and rule.causal) or rule.num_sinks or mixer.head_dim % 16:
            return (
                f"layer {number} has attention with a soft cap, sinks, score positions ({mixer.position.kind}), a head_dim "
                "that is no multiple of 16, or without a causal mask"
            )
    return None


def is_deterministic(model: nn.Module) -> bool:
    """Whether the mode is on."""
    return any(isinstance(m, Linear) and m.deterministic for m in model.modules())


def one_row_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """[N] log-probabilities in nats of `token_ids: [N]` under `logits: [N, V]`, a row at a time: the sum over the
    vocabulary is split among threads by the number of rows, and so would its bits be."""
    rows = [
        row.gather(1, token[None, None]).squeeze() - row.logsumexp(-1).squeeze()
        for row, token in zip(logits.split(1), token_ids, strict=True)
    ]
    return torch.stack(rows) if rows else logits.new_empty(0)


__all__ = [
    "deterministic_refusal",
    "is_deterministic",
    "one_row_logprobs",
    "set_deterministic",
]
