"""Linear layers with one adapter slot, and the embedding.

Every linear is `y = matmul(x)` followed by an optional adapter. Quantization swaps the storage and the
matmul, an adapter fills the slot: the two never meet (a LoRA on a 4-bit base is no class of its own). `deterministic` is set
by `nn/deterministic`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from easyllm.nn.hooks import has_hooks
from easyllm.nn.quantized import QuantizedWeight
from easyllm.ops.deterministic import tiled_linear
from easyllm.ops.embedding import embedding
from easyllm.ops.product import linear, linears


class Linear(nn.Module):
    """y = x Wᵀ + b, then the adapter if there is one.

    Args:
        in_features, out_features: widths of `x: [..., in]` and `y: [..., out]`.
        bias: whether there is a b.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.quantized: QuantizedWeight | None = None
        self.adapter: nn.Module | None = None
        self.deterministic = False

    def matmul(self, x: Tensor) -> Tensor:
        """The base layer's output alone."""
        if self.quantized is not None:
            return self.quantized.linear(x, self.bias)
        if self.deterministic:
            return tiled_linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.matmul(x)
        return y if self.adapter is None else self.adapter(x, y)

    def quantize(self, weight: QuantizedWeight) -> None:
        """Puts a quantized weight in the place of the full one."""
        self.quantized, self.weight = weight, without_rows(self.weight)

    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Gaussian weights, zero bias."""
        nn.init.normal_(self.weight, std=std, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"


def outputs_of(layers: Sequence[Linear], x: Tensor) -> tuple[Tensor, ...]:
    """Every layer's output for the same `x: [..., in]`: in one product, where nothing keeps them apart."""
    if any(
        layer.quantized is not None or layer.deterministic or has_hooks(layer) for layer in layers
    ):
        return tuple(layer(x) for layer in layers)
    found = linears(x, [layer.weight for layer in layers], [layer.bias for layer in layers])
    pairs = zip(layers, found, strict=True)
    return tuple(y if layer.adapter is None else layer.adapter(x, y) for layer, y in pairs)


class Embedding(nn.Embedding):
    """A vector for each token: `token_ids: [T]` → [T, D]; the head's weight as well, where the two are tied."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__(num_tokens, width, _weight=torch.empty(num_tokens, width))
        self.quantized: QuantizedWeight | None = None
        self.deterministic = False

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.quantized is not None:
            return self.quantized.rows(token_ids).to(self.weight.dtype)
        return embedding(token_ids, self.weight)

    def project(self, hidden: Tensor) -> Tensor:
        """`hidden: [N, D]` → [N, V]: products with every token's vector."""
        if self.quantized is not None:
            return self.quantized.linear(hidden)
        if self.deterministic:
            return tiled_linear(hidden, self.weight)
        return linear(hidden, self.weight)

    def quantize(self, weight: QuantizedWeight) -> None:
        """Puts a quantized weight in the place of the full one."""
        self.quantized, self.weight = weight, without_rows(self.weight)


def without_rows(weight: Tensor) -> nn.Parameter:
    """[0, K]: what stays of a quantized weight, its dtype (that of the outputs) and its device."""
    return nn.Parameter(weight.detach()[:0].clone(), requires_grad=False)
