"""Deterministic mode: results that are batch-invariant, in both training and serving.

A row is bitwise independent of the batch composition, and of the number of threads. The mode is
part of the context of a forward pass (`ForwardContext.deterministic`): linears sum in one order,
that of the compiled decoding step, and attention goes through the keys in one order
(`ops/deterministic`). All other operations are row-wise anyway.
"""

import torch

from easyllm.core.errors import ConfigError
from easyllm.nn.attention import Attention
from easyllm.nn.config import AttentionConfig, LatentAttentionConfig, MoEConfig
from easyllm.nn.decoder import Decoder
from easyllm.ops.attention_backends import C_PAGES, C_TRAINING, AttentionCall
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.deterministic import PAGE_SIZE
from easyllm.ops.kernels import kernels_for
from easyllm.ops.logsumexp import logsumexp

ROWWISE_ACTIVATIONS = frozenset({"silu", "relu"})
"""Activations that never depend on the number of rows: SiLU has a C kernel, ReLU is exact."""
WHOLE_VECTORS = 64
"""Maximum number of elements that PyTorch processes at once (bf16 with AVX-512, two vectors)."""


def check_deterministic(model: Decoder) -> None:
    """Checks that a model supports deterministic (batch-invariant) mode.

    Raises:
        ConfigError: the model does not support it; the message has the reason.
    """
    reason = deterministic_unsupported_reason(model)
    if reason is not None:
        raise ConfigError(f"this model does not support deterministic mode: {reason}")


def deterministic_unsupported_reason(model: Decoder) -> str | None:
    """Returns why a model does not support deterministic mode; None if it does."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    if kernels_for(*weights) is None:
        return "it needs a CPU, fp32 or bf16 weights, and a C compiler"
    for name, holder in model.weight_modules():
        if not holder.storage.batch_invariant:
            return (
                f"{name} stores its weight as {holder.storage.format}, "
                "whose matrix products are not batch-invariant"
            )
        adapter = holder.adapter
        if adapter is not None and not adapter.batch_invariant:
            return f"{name} has an adapter whose matrix products are not batch-invariant; merge it"
    for number, layer in enumerate(model.config.layers):
        mixer = layer.mixer
        forward = layer.feed_forward
        inner = forward.expert if isinstance(forward, MoEConfig) else forward
        if inner.activation not in ROWWISE_ACTIVATIONS and inner.intermediate_size % WHOLE_VECTORS:
            return (
                f"layer {number} has {inner.activation} with an intermediate size of "
                f"{inner.intermediate_size}, which is not a multiple of {WHOLE_VECTORS}: "
                "PyTorch computes the last elements of a tensor differently"
            )
        if isinstance(mixer, LatentAttentionConfig):
            return (
                f"layer {number} has latent attention, which computes scores from its cache in "
                "another order than without one"
            )
        if not isinstance(mixer, AttentionConfig):
            return (
                f"layer {number} has linear attention, whose order of summation depends on the "
                "length of the forward pass"
            )
        attention = model.layers[number].mixer
        assert isinstance(attention, Attention), "built from this configuration"
        reason = _attention_unsupported_reason(attention.rule, mixer.head_dim, model)
        if reason is not None:
            kind = f" ({mixer.position.kind})" if attention.rule.terms is not None else ""
            return f"layer {number} has attention with {reason}{kind}"
    return None


def _attention_unsupported_reason(rule: AttentionRule, head_dim: int, model: Decoder) -> str | None:
    """Returns why a layer's attention is not supported: values and gradients need one kernel each.

    Values come from the C kernel for pages, gradients from the C kernels for training.
    """
    dtype = model.dtype
    call = AttentionCall(rule, model.device, dtype, dtype, dtype, head_dim)
    return C_PAGES.unsupported_reason(
        call._replace(page_size=PAGE_SIZE)
    ) or C_TRAINING.unsupported_reason(call._replace(gradients=True))


def rowwise_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Returns the log-probabilities [N] in nats of `token_ids: [N]`, given `logits: [N, V]`.

    A result depends only on its own row: sums over the vocabulary have one order.
    """
    return logits.gather(1, token_ids[:, None]).squeeze(1) - logsumexp(logits)


__all__ = ["check_deterministic", "deterministic_unsupported_reason", "rowwise_logprobs"]
