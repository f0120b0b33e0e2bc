"""Feed-forward blocks."""

from torch import Tensor, nn

from easyllm.nn.config import GLUConfig
from easyllm.nn.linear import Linear
from easyllm.ops.activation import gated


class GLU(nn.Module):
    """down(act(gate(x)) ⊙ up(x)) (arXiv 2002.05202, eq. 5-6)."""

    def __init__(self, config: GLUConfig, hidden_size: int) -> None:
        super().__init__()
        self.activation = config.activation
        width = config.intermediate_size
        self.gate_proj = Linear(hidden_size, width, bias=config.bias)
        self.up_proj = Linear(hidden_size, width, bias=config.bias)
        self.down_proj = Linear(width, hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x: [T, D]` → [T, D]."""
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.activation))


def build_feed_forward(config: GLUConfig, hidden_size: int) -> nn.Module:
    """The feed-forward a configuration names."""
    return GLU(config, hidden_size)
