"""Linear layers with one adapter slot.

Every linear is `y = matmul(x)` followed by an optional adapter. Quantization swaps the storage and the
matmul, an adapter fills the slot: the two never meet (a LoRA on a 4-bit base is no class of its own).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        self.adapter: nn.Module | None = None

    def matmul(self, x: Tensor) -> Tensor:
        """The base layer's output alone."""
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.matmul(x)
        return y if self.adapter is None else self.adapter(x, y)

    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Gaussian weights, zero bias."""
        nn.init.normal_(self.weight, std=std, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"
