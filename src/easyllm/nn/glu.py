"""Gated feed-forward: the block of a layer, and the expert of a mixture."""

from torch import Tensor, nn

from easyllm.nn.config import GLUConfig
from easyllm.nn.linear import Linear, outputs_of
from easyllm.ops.activation import gated
from easyllm.ops.attention import AttentionContext


class GLU(nn.Module):
    """down(act(gate(x)) ⊙ up(x)) (arXiv 2002.05202, eqs. 5 and 6)."""

    def __init__(self, config: GLUConfig, hidden_size: int) -> None:
        super().__init__()
        self.activation = config.activation
        width = config.intermediate_size
        self.gate_proj = Linear(hidden_size, width, bias=config.bias)
        self.up_proj = Linear(hidden_size, width, bias=config.bias)
        self.down_proj = Linear(width, hidden_size, bias=config.bias)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:  # noqa: ARG002 - for mixtures
        """`x: [T, D]` → [T, D]; a token's result does not depend on `context`."""
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """The same for any rows, as an expert is given them."""
        gate, up = outputs_of((self.gate_proj, self.up_proj), x)
        return self.down_proj(gated(gate, up, self.activation))
