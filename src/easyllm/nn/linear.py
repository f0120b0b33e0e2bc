"""Linear layers with one adapter slot, and the embedding.

A layer's weight is kept by its `storage`, and an adapter fills its slot: the two never meet (a LoRA on a 4-bit base is not
a class of its own). An adapter is given the layer's own product as a function, `BaseProduct`, and decides whether and on
what to call it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from easyllm.nn.context import ForwardContext
from easyllm.nn.cost import Activation, CostTrace, LinearShape
from easyllm.nn.hooks import has_hooks
from easyllm.nn.storage import DenseWeight, WeightStorage
from easyllm.ops.deterministic import tiled_linear
from easyllm.ops.product import linears


class LinearAdapter(Protocol):
    """What fills the slot of a `Linear` (the whole protocol is `adapters.adapter.Adapter`).

    Attributes:
        keeps_input: whether `base` is called once, with `x` itself, so that layers of one input may share a product.
        batch_invariant: whether a row's bits do not depend on other rows, in deterministic mode.
    """

    keeps_input: bool
    batch_invariant: bool

    def __call__(self, x: Tensor, base: "BaseProduct") -> Tensor:
        """The adapted layer's output [..., out] for `x: [..., in]`."""

    def loss_product(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """x' and W' whose product is the adapted layer's output for `x` and a base of `weight`."""

    def cost(
        self, trace: CostTrace, linear: LinearShape, x: Activation, rows: int, name: str
    ) -> None:
        """Notes what runs and is kept besides the layer's own product."""


class Linear(nn.Module):
    """y = x Wᵀ + b, or what the adapter makes of it.

    Args:
        in_features, out_features: widths of `x: [..., in]` and `y: [..., out]`.
        bias: whether there is a b.

    Attributes:
        storage: how W is kept; by default as the parameter `weight: [out, in]`.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.storage: WeightStorage = DenseWeight(self._parameters)
        self.adapter: LinearAdapter | None = None

    def forward(self, x: Tensor, context: ForwardContext | None = None) -> Tensor:
        base = BaseProduct(self, context)
        return base(x) if self._is_plain(context) else self.adapter(x, base)  # type: ignore[misc]

    def wide(self, x: Tensor, context: ForwardContext | None = None) -> Tensor:
        """The same with the weight widened to the dtype of `x`: a router decides in fp32."""
        base = BaseProduct(self, context, widened=True)
        return base(x) if self._is_plain(context) else self.adapter(x, base)  # type: ignore[misc]

    def _is_plain(self, context: ForwardContext | None) -> bool:
        """Whether the layer's own product is all that is asked for."""
        return self.adapter is None or (context is not None and context.base_only)

    def store(self, storage: WeightStorage) -> None:
        """Keeps the weight in another storage; the full one is let go."""
        put_storage(self, storage)

    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Gaussian weights, zero bias."""
        nn.init.normal_(self.weight, std=std, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"


@dataclass(slots=True)
class BaseProduct:
    """A layer's own product, without its adapter: `base(x)` is x Wᵀ + b.

    Attributes:
        layer: whose product it is; its bias and storage are there to be read.
        context: of the forward pass, where it is known.
        widened: whether the weight is widened to the dtype of x.
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
            return (tiled_linear if deterministic else nn.functional.linear)(x, weight, bias)
        return layer.storage.linear(x, layer.bias, deterministic=deterministic)

    @property
    def weight(self) -> Tensor:
        """The layer's weight [out, in], dequantized where it is quantized."""
        return self.layer.storage.dense()


@dataclass(slots=True)
class _Shared(BaseProduct):
    """The product of a layer that shares one with others of the same input."""

    x: Tensor | None = None
    y: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if x is self.x and self.y is not None:
            return self.y
        return BaseProduct.__call__(self, x)


def outputs_of(
    layers: Sequence[Linear], x: Tensor, context: ForwardContext | None = None
) -> tuple[Tensor, ...]:
    """Every layer's output for the same `x: [..., in]`: in one product, where nothing keeps them apart."""
    deterministic = context is not None and context.deterministic
    if deterministic or not all(_joins(layer) for layer in layers):
        return tuple(layer(x, context) for layer in layers)
    found = linears(
        x, [layer.storage.dense() for layer in layers], [layer.bias for layer in layers]
    )
    plain = context is not None and context.base_only
    return tuple(
        y if layer.adapter is None or plain else layer.adapter(x, _Shared(layer, context, x=x, y=y))
        for layer, y in zip(layers, found, strict=True)
    )


def _joins(layer: Linear) -> bool:
    """Whether a layer's product may be computed along with those of others."""
    keeps_input = layer.adapter is None or layer.adapter.keeps_input
    return keeps_input and isinstance(layer.storage, DenseWeight) and not has_hooks(layer)


class Embedding(nn.Embedding):
    """A vector for each token: `token_ids: [T]` → [T, D]; the head's weight as well, where the two are tied."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__(num_tokens, width, _weight=torch.empty(num_tokens, width))
        self.storage: WeightStorage = DenseWeight(self._parameters)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.storage.rows(token_ids)

    def project(self, hidden: Tensor, context: ForwardContext | None = None) -> Tensor:
        """`hidden: [N, D]` → [N, V]: products with every token's vector."""
        deterministic = context is not None and context.deterministic
        return self.storage.linear(hidden, deterministic=deterministic)

    def store(self, storage: WeightStorage) -> None:
        """Keeps the vectors in another storage; the full ones are let go."""
        put_storage(self, storage)


def put_storage(layer: Linear | Embedding, storage: WeightStorage) -> None:
    """Gives a layer another storage; a full weight becomes its parameter `weight`, of which there is otherwise none."""
    expected = layer.storage.shape
    assert tuple(storage.shape) == tuple(expected), f"{storage.shape} is not the layer's {expected}"
    if not isinstance(storage, DenseWeight):
        layer.register_parameter("weight", None)
    layer.storage = storage


def put_weight(layer: Linear | Embedding, weight: Tensor) -> None:
    """Gives a layer a full weight [N, K], in place of whatever it had."""
    layer.__dict__.pop("storage", None)
    layer._modules.pop("storage", None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.storage = DenseWeight(layer._parameters)
