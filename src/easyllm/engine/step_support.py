"""Which models, caches and adapters the compiled decoding step supports, with the reasons."""

from collections.abc import Sequence

import torch

from easyllm.nn.attention import Attention
from easyllm.nn.config import AttentionConfig, GLUConfig, LayerConfig
from easyllm.nn.decoder import Decoder, DecoderLayer
from easyllm.nn.linear import Embedding, Linear
from easyllm.nn.position_config import BY_LENGTH, Alibi, NoPosition, Rope
from easyllm.ops.attention_backends import C_PAGES, KEYS_PER_BLOCK
from easyllm.ops.deterministic import sums_have_fixed_order
from easyllm.ops.kernels import kernels_for
from easyllm.ops.paged_attention import Pages, QuantizedPages, paged_call

ARITHMETIC = torch.float32
"""Dtype of all activations, hence of the queries."""


def unsupported_reason(
    model: Decoder,
    pages: tuple[Sequence[Pages], Sequence[Pages]] | None = None,
    *,
    deterministic: bool = False,
) -> str | None:
    """Returns why the compiled step does not support the model, or its cache; None if it does.

    Args:
        model: the model.
        pages: key pages and value pages of each layer; None checks the model only.
        deterministic: whether results must bitwise equal those of the decoder in deterministic
            mode.
    """
    if model.training or kernels_for(*model.parameters()) is None:
        return (
            "it needs inference mode, a CPU, weights of fp32 or bf16 (or quantized) and a C "
            "compiler"
        )
    if model.config.encoder is not None:
        return "it has an encoder"
    if model.model_adapter is not None or not all(
        _adapter_is_supported(holder) for _, holder in model.weight_modules()
    ):
        return "it has adapters; merge them"
    for name, holder in model.weight_modules():
        if holder.storage.kernel_matrix(None) is None:
            return (
                f"{name} stores its weight as {holder.storage.format}, which the kernels do not "
                "read"
            )
    if deterministic and not sums_have_fixed_order(model.dtype):
        return f"sums of {model.dtype} have no fixed order in the kernels on this processor"
    reason = _model_unsupported_reason(model)
    if reason is not None or pages is None:
        return reason
    return _pages_unsupported_reason(model, *pages, deterministic=deterministic)


def _adapter_is_supported(holder: Linear | Embedding) -> bool:
    """Whether a layer has no adapter, or one that can be compiled.

    Named adapters always can: a step whose rows use one of another form is not compiled.
    """
    if isinstance(holder, Embedding):
        return holder.adapter is None
    adapter = holder.adapter
    if adapter is None:
        return True
    return adapter.selected_by_row or adapter.low_rank() is not None


def _model_unsupported_reason(model: Decoder) -> str | None:
    """Returns the first part of the architecture that the step does not support."""
    config = model.config
    if config.norm.kind != "rms_norm" or not config.final_norm:
        return "its norms are not RMS norms, or it has no norm before the head"
    if not isinstance(config.embedding_position, NoPosition):
        return f"positions are added to its embedding ({config.embedding_position.kind})"
    if config.logit_softcap is not None or config.num_labels is not None:
        return "its logits are soft-capped, or it has a classification head"
    for number, (layer, module) in enumerate(zip(config.layers, model.layers, strict=True)):
        assert isinstance(module, DecoderLayer), "a decoder has decoder layers"
        reason = _layer_unsupported_reason(layer, module)
        if reason is not None:
            return f"layer {number}: {reason}"
    return None


def _layer_unsupported_reason(layer: LayerConfig, module: DecoderLayer) -> str | None:
    mixer, feed_forward = layer.mixer, layer.feed_forward
    if layer.norm_placement != "pre":
        return f"norm placement {layer.norm_placement}"
    if not isinstance(feed_forward, GLUConfig) or feed_forward.activation != "silu":
        return "a feed-forward other than a GLU with SiLU"
    if not isinstance(mixer, AttentionConfig):
        return mixer.kind.replace("_", " ")
    if mixer.logn_length is not None:
        return "attention with log-n scaling"
    reason = _position_unsupported_reason(mixer)
    if reason is not None:
        return reason
    shape = (1, mixer.num_kv_heads, KEYS_PER_BLOCK, mixer.head_dim)
    pages = torch.empty(shape, dtype=ARITHMETIC)  # the format of the cache is checked separately
    reason = C_PAGES.unsupported_reason(
        paged_call(pages, pages, attention_of(module).rule, dtype=ARITHMETIC)
    )
    return None if reason is None else f"attention with {reason}"


def _position_unsupported_reason(mixer: AttentionConfig) -> str | None:
    match mixer.position:
        case NoPosition() | Alibi():
            return None
        case Rope(interleaved=False, scaling=scaling) if not isinstance(scaling, BY_LENGTH):
            return None
    return (
        "positions other than ALiBi or half-split RoPE with fixed frequencies "
        f"({mixer.position.kind})"
    )


def _pages_unsupported_reason(
    model: Decoder,
    key_pages: Sequence[Pages],
    value_pages: Sequence[Pages],
    *,
    deterministic: bool,
) -> str | None:
    if not len(key_pages) == len(value_pages) == model.config.num_layers:
        return f"{len(key_pages)} layers of pages for {model.config.num_layers} layers"
    if len({pages.shape[2] for pages in (*key_pages, *value_pages)}) != 1:
        return "pages of different sizes"
    for layer, keys, values in zip(model.layers, key_pages, value_pages, strict=True):
        assert isinstance(layer, DecoderLayer), "a decoder has decoder layers"
        rule = attention_of(layer).rule
        reason = C_PAGES.unsupported_reason(paged_call(keys, values, rule, dtype=ARITHMETIC))
        if reason is not None:
            return f"its cache has {reason}"
        if deterministic and isinstance(keys, QuantizedPages):
            return "its cache is quantized, which rounds halves in another way than PyTorch"
    return None


def attention_of(layer: DecoderLayer) -> Attention:
    """Returns the attention of a layer of a supported model."""
    assert isinstance(layer.mixer, Attention), "unsupported_reason() requires softmax attention"
    return layer.mixer
