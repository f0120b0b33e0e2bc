"""Tensor parallelism: the ranks of a group share every layer (arXiv 1909.08053, section 3).

    q, k, v, gate, up    column-parallel: a rank computes some heads, or a part of the width
    o, down              row-parallel: the ranks' products are summed
    embedding, head      rows of the vocabulary

    x ─ f ─ q k v ─ attention ─ o ─ g ─ + ─ f ─ gate up ─ down ─ g ─ +      4 all-reduces a layer

The input of q, k and v (and of gate and up) is prepared once. With sequence parallelism the
residual stream and the norms hold T / size tokens; f becomes an all-gather and g a reduce-scatter:
4 pairs of them a layer, forward and backward. The model's code is not changed: the modules'
`forward` is wrapped, and their parameters are replaced by slices.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easyllm.core.errors import ConfigError
from easyllm.nn.attention import Attention
from easyllm.nn.config import AttentionConfig, GLUConfig, MLPConfig, ModelConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Embedding, Linear
from easyllm.nn.position_config import NoPosition, Rope
from easyllm.parallel.exchange import copy, gather, reduce, scatter
from easyllm.parallel.mesh import Group
from easyllm.parallel.pieces import Piece
from easyllm.parallel.vocabulary import Vocabulary

Forward = Callable[..., Tensor]


@dataclass
class TensorSharding:
    """What tensor parallelism has made of the parameters.

    Attributes:
        group: the ranks.
        sequence: whether tokens are divided, too.
        slices: the slices of the parameters that are divided, by name.
        partial: parameters that all ranks hold, but of whose gradient each computes one term.
    """

    group: Group
    sequence: bool
    slices: dict[str, Piece] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)

    def enter(self, x: Tensor) -> Tensor:
        """f: prepares the input of column-parallel linears."""
        return gather(x, self.group) if self.sequence else copy(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """g: sums the outputs of row-parallel linears."""
        return scatter(x, self.group) if self.sequence else reduce(x, self.group)


def check_tensor_parallel(model: ModelConfig, degree: int, *, sequence: bool = False) -> None:
    """Checks that a model can be divided among `degree` ranks.

    Raises:
        ConfigError: it cannot; the message names the degrees that would do, or another layout.
    """
    if degree == 1:
        return
    reason = unsupported_reason(model, sequence=sequence)
    if reason is not None:
        raise ConfigError(
            f"parallel.tensor={degree} does not support {reason}; set parallel.tensor=1 with "
            "parallel.layout zero1, zero2, zero3 or fsdp"
        )
    sizes = _divided_sizes(model)
    wrong = [f"{name}={size}" for name, size in sizes.items() if size % degree]
    if wrong:
        fits = ", ".join(map(str, tensor_degrees(model))) or "no degree above 1"
        raise ConfigError(
            f"parallel.tensor={degree} does not divide {', '.join(wrong)}; degrees that do: {fits}"
        )


def tensor_degrees(model: ModelConfig) -> list[int]:
    """Returns the degrees above 1 by which a model can be divided, in ascending order."""
    if unsupported_reason(model) is not None:
        return []
    common = math.gcd(*_divided_sizes(model).values())
    return [n for n in range(2, common + 1) if common % n == 0]


def unsupported_reason(model: ModelConfig, *, sequence: bool = False) -> str | None:
    """Returns why a model cannot be divided at all, or None."""
    for layer in model.layers:
        if not isinstance(layer.mixer, AttentionConfig):
            return f"mixers of kind {layer.mixer.kind}"
        if not isinstance(layer.mixer.position, Rope | NoPosition):
            return f"positions of kind {layer.mixer.position.kind}, which differ between heads"
        if layer.mixer.directions is not None:
            return "heads with directions of their own"
        if not isinstance(layer.feed_forward, GLUConfig | MLPConfig):
            return "mixtures of experts"
    if model.num_labels is not None:
        return "a score head"
    if sequence and not isinstance(model.embedding_position, NoPosition):
        return "position embeddings together with parallel.sequence"
    return None


def _divided_sizes(model: ModelConfig) -> dict[str, int]:
    sizes = {"vocab_size": model.vocab_size}
    for layer in model.layers:
        assert isinstance(layer.mixer, AttentionConfig), "checked before"
        assert isinstance(layer.feed_forward, GLUConfig | MLPConfig), "checked before"
        for name, size in (
            ("num_heads", layer.mixer.num_heads),
            ("num_kv_heads", layer.mixer.num_kv_heads),
            ("intermediate_size", layer.feed_forward.intermediate_size),
        ):
            sizes[name] = math.gcd(sizes.get(name, size), size)
    return sizes


def shard_tensors(
    model: Decoder, group: Group, *, sequence: bool, adapter_axes: "AdapterAxes | None" = None
) -> TensorSharding:
    """Divides a decoder among the ranks of a group, in place.

    Args:
        model: the decoder, the same on all ranks.
        group: the ranks.
        sequence: whether the residual stream is divided by tokens, too.
        adapter_axes: returns which axes of an adapter's parameters follow the layer.

    Raises:
        ConfigError: the model cannot be divided, or has quantized weights or another adapter.
    """
    check_tensor_parallel(model.config, group.size, sequence=sequence)
    if packed := model.packed_formats():
        raise ConfigError(
            f"parallel.tensor={group.size} does not divide weights stored as "
            f"{', '.join(sorted(packed))}; set parallel.tensor=1"
        )
    if model.model_adapter is not None or model.embed_tokens.adapter is not None:
        raise ConfigError(
            f"parallel.tensor={group.size} does not support adapters of the embedding or of the "
            "prompt; set parallel.tensor=1"
        )
    sharding = TensorSharding(group, sequence)
    for number, layer in enumerate(model.layers):
        prefix = f"layers.{number}."
        mixer: Any = layer.mixer
        _divide_attention(mixer, f"{prefix}mixer.", sharding, adapter_axes)
        _divide_feed_forward(
            layer.feed_forward,  # type: ignore[arg-type]
            f"{prefix}feed_forward.",
            sharding,
            adapter_axes,
        )
    _divide_vocabulary(model, sharding)
    if sequence:
        norms = (n for n, _ in model.named_parameters() if "norm" in n.rpartition(".")[0])
        sharding.partial.update(norms)
    return sharding


AdapterAxes = Callable[[Any, int], dict[str, int | None] | None]
"""Given an adapter and the divided axis of its layer's weight (0 or 1), returns the axis of each
of the adapter's parameters that is divided with it, or None for one that all ranks hold."""


def _divide_attention(
    attention: Attention, prefix: str, sharding: TensorSharding, axes: AdapterAxes | None
) -> None:
    size = sharding.group.size
    config = attention.config
    attention.config = config.model_copy(
        update={
            "num_heads": config.num_heads // size,
            "num_kv_heads": config.num_kv_heads // size,
        }
    )
    for name in ("q_proj", "k_proj", "v_proj"):
        _divide_linear(getattr(attention, name), f"{prefix}{name}.", 0, sharding, axes)
    _divide_linear(attention.o_proj, f"{prefix}o_proj.", 1, sharding, axes)
    for name in ("q_norm", "k_norm"):  # shared by all heads, of which each rank has some
        norm = getattr(attention, name)
        sharding.partial.update(f"{prefix}{name}.{leaf}" for leaf, _ in norm.named_parameters())
    _enter_before(attention, sharding)


def _divide_feed_forward(
    block: nn.Module, prefix: str, sharding: TensorSharding, axes: AdapterAxes | None
) -> None:
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        if hasattr(block, name):
            _divide_linear(getattr(block, name), f"{prefix}{name}.", axis, sharding, axes)
    _enter_before(block, sharding)


def _enter_before(block: nn.Module, sharding: TensorSharding) -> None:
    plain: Forward = block.forward

    def forward(x: Tensor, context: ForwardContext) -> Tensor:
        return plain(sharding.enter(x), context)

    block.forward = forward


def _divide_linear(
    layer: Linear, prefix: str, axis: int, sharding: TensorSharding, axes: AdapterAxes | None
) -> None:
    """Replaces the parameters of a linear by slices; a row-parallel one sums its outputs."""
    _slice(layer, "weight", f"{prefix}weight", axis, sharding)
    if layer.bias is not None and axis == 0:
        _slice(layer, "bias", f"{prefix}bias", 0, sharding)
    if layer.adapter is not None:
        found = None if axes is None else axes(layer.adapter, axis)
        if found is None:
            raise ConfigError(
                f"parallel.tensor={sharding.group.size} does not divide this kind of adapter, "
                "only adapter.kind=lora; set parallel.tensor=1"
            )
        for leaf, divided in found.items():
            name = f"{prefix}adapter.{leaf}"
            if divided is None:
                sharding.partial.add(name)
            else:
                _slice(layer.adapter, leaf, name, divided, sharding)  # type: ignore[arg-type]
    if axis == 1:
        if layer.bias is not None and sharding.sequence:
            sharding.partial.add(f"{prefix}bias")
        layer.forward = _row_parallel(layer, sharding)  # type: ignore[method-assign]
    layer.out_features, layer.in_features = layer.weight.shape


def _row_parallel(layer: Linear, sharding: TensorSharding) -> Forward:
    """Returns a forward pass that sums the ranks' products, and adds the bias once."""
    plain: Forward = layer.forward

    def forward(x: Tensor, context: ForwardContext | None = None) -> Tensor:
        bias = layer.bias
        if bias is None:
            return sharding.leave(plain(x, context))
        layer._parameters["bias"] = None
        try:
            out = plain(x, context)
        finally:
            layer._parameters["bias"] = bias
        return sharding.leave(out) + bias

    return forward


def _divide_vocabulary(model: Decoder, sharding: TensorSharding) -> None:
    """Divides the embedding and the head by rows, and wraps what reads them."""
    group = sharding.group
    width = model.config.vocab_size // group.size
    shard = Vocabulary(group, group.rank * width, (group.rank + 1) * width)
    table = model.embed_tokens
    _slice(table, "weight", "embed_tokens.weight", 0, sharding)
    if model.lm_head is not None:
        if model.lm_head.adapter is not None:
            raise ConfigError("parallel.tensor does not support an adapter of the head; remove it")
        _slice(model.lm_head, "weight", "lm_head.weight", 0, sharding)
    model.vocabulary = shard
    _wrap_embedding(table, shard, sharding)
    plain_forward: Forward = model.forward
    plain_head: Forward = model.head

    def forward(token_ids: Tensor, context: ForwardContext) -> Tensor:
        if not sharding.sequence:
            return copy(plain_forward(token_ids, context), group)
        count = len(token_ids)
        hidden = plain_forward(*_padded(token_ids, context, group.size))
        return gather(hidden, group)[:count]

    def head(hidden: Tensor, context: ForwardContext | None = None) -> Tensor:
        return shard.all_logits(plain_head(hidden, context))

    model.forward = forward  # type: ignore[method-assign]
    model.head = head  # type: ignore[method-assign]


def _wrap_embedding(table: Embedding, shard: Vocabulary, sharding: TensorSharding) -> None:
    plain: Forward = table.forward

    def forward(token_ids: Tensor, context: ForwardContext | None = None) -> Tensor:
        rows, mine = shard.rows(token_ids)
        return sharding.leave(plain(rows, context) * mine[:, None])

    table.forward = forward  # type: ignore[method-assign]


def _padded(token_ids: Tensor, context: ForwardContext, size: int) -> tuple[Tensor, ForwardContext]:
    """Adds a sequence at the end, so that the number of tokens is a multiple of `size`."""
    missing = -len(token_ids) % size
    if not missing:
        return token_ids, context
    if context.store is not None or context.shared is not None:
        raise ConfigError(
            "parallel.sequence supports training and evaluation only, not generation; remove "
            "samples, or set parallel.sequence=false"
        )
    more = torch.arange(missing, device=token_ids.device)
    longer = replace(
        context,
        positions=torch.cat([context.positions, more]),
        lengths=(*context.lengths, missing),
        prefix_lengths=None
        if context.prefix_lengths is None
        else (*context.prefix_lengths, missing),
        memo={},
    )
    return F.pad(token_ids, (0, missing)), longer


def _slice(owner: nn.Module, leaf: str, name: str, axis: int, sharding: TensorSharding) -> None:
    parameter = owner._parameters[leaf]
    assert parameter is not None, "the caller has looked"
    group = sharding.group
    width = parameter.shape[axis] // group.size
    low = group.rank * width
    sharding.slices[name] = Piece.slice(parameter.shape, axis, low, low + width)
    part = parameter.detach().narrow(axis, low, width).contiguous().clone()
    owner._parameters[leaf] = nn.Parameter(part, requires_grad=parameter.requires_grad)


__all__ = [
    "AdapterAxes",
    "TensorSharding",
    "check_tensor_parallel",
    "shard_tensors",
    "tensor_degrees",
    "unsupported_reason",
]
