"""Linear layers with one adapter slot, and the embedding.

A layer's weight is stored in its `storage`, and its slot contains an adapter. The two are
independent (LoRA on a 4-bit base is not a separate class): an adapter receives the layer's own
matrix product (GEMM) as a function, `BaseLinear`, and decides whether and with what input to call
it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from easyllm.nn.context import ForwardContext
from easyllm.nn.cost import AdapterCost
from easyllm.nn.hooks import has_hooks
from easyllm.nn.storage import DenseWeight, WeightStorage
from easyllm.ops.deterministic import fixed_order_linear
from easyllm.ops.low_rank import LowRank
from easyllm.ops.matmul import linears


class LinearAdapter(AdapterCost, Protocol):
    """An adapter in the slot of a `Linear` (the full protocol is `adapters.adapter.Adapter`).

    Attributes:
        passes_input_unchanged: whether `base` is called once, with `x` itself, so that layers with
            the same input can share a matrix product.
        batch_invariant: whether rows are bitwise independent of each other in deterministic mode.
        selected_by_row: whether it is a bank of named adapters, of which each row selects one.
    """

    passes_input_unchanged: bool
    batch_invariant: bool
    selected_by_row: bool

    def __call__(self, x: Tensor, base: "BaseLinear") -> Tensor:
        """Returns the adapted layer's output [..., out] for `x: [..., in]`."""

    def low_rank(self) -> LowRank | None:
        """Returns A [r, in], B [out, r] and s if the output is base(x) + s B A x, else None."""

    def loss_factors(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x' and W' such that x' W'ᵀ is the adapted output for `x` and base `weight`."""


class TableAdapter(Protocol):
    """An adapter in the slot of an `Embedding` (see `adapters.adapter.EmbeddingAdapter`)."""

    batch_invariant: bool

    def __call__(
        self, token_ids: Tensor, base: Callable[[Tensor], Tensor], *, deterministic: bool
    ) -> Tensor:
        """Returns the adapted vectors [T, D] of `token_ids: [T]`."""

    def project(
        self, hidden: Tensor, base: Callable[[Tensor], Tensor], *, deterministic: bool
    ) -> Tensor:
        """Returns the logits [N, V] of a tied head for `hidden: [N, D]`."""

    def loss_factors(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x' and W' such that x' W'ᵀ are the logits of a tied head."""


class Linear(nn.Module):
    """A linear layer, y = x Wᵀ + b, with an optional adapter.

    Args:
        in_features, out_features: widths of `x: [..., in]` and `y: [..., out]`.
        bias: whether the layer has a bias b.

    Attributes:
        storage: the storage of W; by default the parameter `weight: [out, in]`.
        adapter: the adapter, or None.
    """

    __call__: Callable[..., Tensor]  # `nn.Module` declares Any

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.storage: WeightStorage = DenseWeight(self._parameters)
        self.adapter: LinearAdapter | None = None

    def forward(self, x: Tensor, context: ForwardContext | None = None) -> Tensor:
        """Returns the output [..., out] for `x: [..., in]`."""
        base = BaseLinear(self, context)
        return base(x) if self._is_plain(context) else self.adapter(x, base)  # type: ignore[misc]

    def wide(self, x: Tensor, context: ForwardContext | None = None) -> Tensor:
        """Returns the output with the weight cast to the dtype of `x` (a router runs in fp32)."""
        base = BaseLinear(self, context, widened=True)
        return base(x) if self._is_plain(context) else self.adapter(x, base)  # type: ignore[misc]

    def _is_plain(self, context: ForwardContext | None) -> bool:
        """Whether no adapter applies, so that the output is the layer's own matrix product."""
        return self.adapter is None or (context is not None and context.base_only)

    def store(self, storage: WeightStorage) -> None:
        """Stores the weight in another storage and frees the full weight."""
        set_storage(self, storage)

    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Initialises the weight from N(0, std²) and the bias to zero."""
        nn.init.normal_(self.weight, std=std, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Returns the sizes and bias for `repr`."""
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"


@dataclass(slots=True)
class BaseLinear:
    """A layer's own matrix product, without its adapter: `base(x)` returns x Wᵀ + b.

    Attributes:
        layer: the layer; adapters may read its bias and storage.
        context: the context of the forward pass, if known.
        widened: whether the weight is cast to the dtype of x.
    """

    layer: Linear
    context: ForwardContext | None = None
    widened: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        deterministic = self.context is not None and self.context.deterministic
        if self.widened:
            weight = layer.storage.dense().to(x.dtype)
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            return (fixed_order_linear if deterministic else nn.functional.linear)(x, weight, bias)
        return layer.storage.linear(x, layer.bias, deterministic=deterministic)

    @property
    def weight(self) -> Tensor:
        """The layer's weight [out, in], dequantized if it is quantized."""
        return self.layer.storage.dense()


@dataclass(slots=True)
class KnownProduct(BaseLinear):
    """A layer's matrix product for an input x, for which the result y is known already.

    It was computed together with other layers, or with other rows.
    """

    x: Tensor | None = None
    y: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if x is self.x and self.y is not None:
            return self.y
        return BaseLinear.__call__(self, x)


def fused_linears(
    layers: Sequence[Linear], x: Tensor, context: ForwardContext | None = None
) -> tuple[Tensor, ...]:
    """Returns the outputs of several layers for the same `x: [..., in]`.

    The layers share one matrix product if their storages, adapters and hooks allow it.
    """
    deterministic = context is not None and context.deterministic
    if deterministic or not all(_joins(layer) for layer in layers):
        return tuple(layer(x, context) for layer in layers)
    found = linears(
        x, [layer.storage.dense() for layer in layers], [layer.bias for layer in layers]
    )
    plain = context is not None and context.base_only
    return tuple(
        y
        if layer.adapter is None or plain
        else layer.adapter(x, KnownProduct(layer, context, x=x, y=y))
        for layer, y in zip(layers, found, strict=True)
    )


def _joins(layer: Linear) -> bool:
    """Whether a layer's matrix product can be computed together with those of other layers."""
    passes_input_unchanged = layer.adapter is None or layer.adapter.passes_input_unchanged
    return (
        passes_input_unchanged and isinstance(layer.storage, DenseWeight) and not has_hooks(layer)
    )


class Embedding(nn.Embedding):
    """The token embedding, which is also the head's weight with tied embeddings."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__(num_tokens, width, _weight=torch.empty(num_tokens, width))
        self.storage: WeightStorage = DenseWeight(self._parameters)
        self.adapter: TableAdapter | None = None

    def forward(self, token_ids: Tensor, context: ForwardContext | None = None) -> Tensor:
        """Returns the vectors [T, D] of `token_ids: [T]`."""
        if self.adapter is None or (context is not None and context.base_only):
            return self.storage.rows(token_ids)
        deterministic = context is not None and context.deterministic
        return self.adapter(token_ids, self.storage.rows, deterministic=deterministic)

    def project(self, hidden: Tensor, context: ForwardContext | None = None) -> Tensor:
        """Returns `hidden: [N, D]` multiplied by the vectors of all tokens, [N, V]."""

        deterministic = context is not None and context.deterministic

        def base(hidden: Tensor) -> Tensor:
            return self.storage.linear(hidden, deterministic=deterministic)

        if self.adapter is None or (context is not None and context.base_only):
            return base(hidden)
        return self.adapter.project(hidden, base, deterministic=deterministic)

    def store(self, storage: WeightStorage) -> None:
        """Stores the vectors in another storage and frees the full ones."""
        set_storage(self, storage)


def set_storage(layer: Linear | Embedding, storage: WeightStorage) -> None:
    """Sets the storage of a layer; removes the parameter `weight` unless the storage is dense."""
    expected = layer.storage.shape
    assert tuple(storage.shape) == tuple(expected), f"{storage.shape} is not the layer's {expected}"
    if not isinstance(storage, DenseWeight):
        layer.register_parameter("weight", None)
    layer.storage = storage


def set_full_weight(layer: Linear | Embedding, weight: Tensor) -> None:
    """Replaces the weight of a layer, whatever its storage, by a full one without a gradient."""
    assert tuple(weight.shape) == tuple(layer.storage.shape), f"{weight.shape} is not the layer's"
    if isinstance(layer.storage, nn.Module):
        del layer.storage
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.storage = DenseWeight(layer._parameters)
