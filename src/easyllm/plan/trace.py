"""Cost trace of the complete decoder: its layers, and everything outside them."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from easyllm.adapters import AdapterConfig
from easyllm.nn.config import ModelConfig
from easyllm.nn.cost import (
    FP32,
    INT64,
    Activation,
    CostTrace,
    Gemm,
    LayerTrace,
    Work,
    saved_bytes,
)
from easyllm.nn.position_config import Learned
from easyllm.plan.parts import (
    encoder_layers,
    layers_of,
    mixer_of,
    outside_of,
    trains_head,
    virtual_tokens,
)

BOOL = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTrace:
    """Cost trace of a forward pass.

    Attributes:
        layers: traces of the layers.
        adapter: matrix products of an adapter outside the layers (an encoder of virtual tokens).
        head: the matrix product (GEMM) of the head.
        shared_bytes: bytes saved for the backward pass outside the layers.
    """

    layers: list[LayerTrace]
    adapter: list[Gemm]
    head: Gemm
    shared_bytes: int


def trace_model(
    config: ModelConfig, work: Work, adapter: AdapterConfig | None = None
) -> ModelTrace:
    """Traces `Decoder.forward` and the loss, including the virtual tokens of an adapter.

    Raises:
        ConfigError: the adapter does not fit the model.
    """
    trace, real = CostTrace(work), work.tokens
    if adapter is not None and adapter.level == "model":
        work = _with_virtual_tokens(work, virtual_tokens(config, adapter), adapter)
        trace = CostTrace(work)
        # which rows are virtual, and which the decoder returns
        trace.keep("virtual", work.tokens * (INT64 + BOOL) + real * INT64)
        with torch.device("meta"):
            adapter.model_cost(trace, config)
    products = [event for event in trace.events if isinstance(event, Gemm)]
    x = Activation("x", work.tokens * config.hidden_size * FP32, work.input_grad)
    _, first, last = outside_of(config)
    if not isinstance(first, nn.Identity):
        x = trace.of(first, x, "embedding.normed")
    embedded, read = x.nbytes // max(1, work.tokens), len(encoder_layers(config))
    layers, known = [], dict[tuple[int, Activation], tuple[LayerTrace, Activation]]()
    for number, layer in enumerate(layers_of(config, adapter)):
        own = _of_stack(work, encoder=number < read)
        if number in (0, read):  # the first layer of a stack
            x = replace(x, nbytes=own.tokens * embedded)
        key = (id(layer), x)  # equal layers share a module, and cost the same for the same input
        if key not in known:
            known[key] = layer.cost(CostTrace(own), x)
        layer_trace, x = known[key]
        layers.append(layer_trace)
    if not isinstance(last, nn.Identity):
        x = trace.of(last, x, "hidden")
    return ModelTrace(
        layers=layers,
        adapter=products,
        head=_head(config, work, x, trained=trains_head(config, adapter)),
        shared_bytes=saved_bytes(trace.events) + _tables(config, work) + _indices(config, work),
    )


def _of_stack(work: Work, *, encoder: bool) -> Work:
    """Returns the work of the layers of one stack of an encoder–decoder."""
    if work.prefixes is None:
        return work
    if encoder:
        return replace(work, lengths=work.prefixes, prefixes=None)
    pairs = zip(work.lengths, work.prefixes, strict=True)
    return replace(work, lengths=tuple(n - prefix for n, prefix in pairs))


def _with_virtual_tokens(work: Work, virtual: int, adapter: AdapterConfig) -> Work:
    """Returns the work including the virtual tokens, whose gradient a layer or the input gets."""
    return replace(
        work,
        lengths=tuple(n + virtual for n in work.lengths),
        input_grad=not adapter.trains_keys,
        keys_grad=adapter.trains_keys,
    )


def _head(config: ModelConfig, work: Work, hidden: Activation, *, trained: bool) -> Gemm:
    """Returns the head's matrix products in the loss: logits, ∂hidden and, if trained, ∂weight."""
    rows, width = work.labelled, config.vocab_size
    if config.num_labels is not None:
        rows, width, trained = len(work.lengths), config.num_labels, True
    flops = 2 * rows * width * config.hidden_size
    return Gemm("head", flops, flops * (trained + hidden.grad))


def _tables(config: ModelConfig, work: Work) -> int:
    """Returns the bytes of the cos and sin tables of all RoPE variants in the model.

    The tables are computed once per forward pass.
    """
    found: dict[object, int] = {}
    for layer in layers_of(config):
        found |= mixer_of(layer).position.table_elements()
    return sum(work.tokens * width * FP32 for width in found.values())


def _indices(config: ModelConfig, work: Work) -> int:
    """Returns the bytes of the indices saved for the gradients of the embeddings.

    These are the token ids and, with learned position embeddings, the positions.
    """
    if not work.trains_all:
        return 0
    return work.tokens * INT64 * (1 + isinstance(config.embedding_position, Learned))


__all__ = ["LayerTrace", "ModelTrace", "trace_model"]
