"""Gated feed-forward: the block of a layer, and the expert of a mixture."""

from torch import Tensor, nn

from easyllm.nn.config import GLUConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.linear import Linear, outputs_of
from easyllm.ops.activation import gated


class GLU(nn.Module):
    """down(act(gate(x)) ⊙ up(x)) (arXiv 2002.05202, eqs. 5 and 6)."""

    def __init__(self, config: GLUConfig, hidden_size: int) -> None:
        super().__init__()
        self.activation = config.activation
        width = config.intermediate_size
        self.gate_proj = Linear(hidden_size, width, bias=config.bias)
        self.up_proj = Linear(hidden_size, width, bias=config.bias)
        self.down_proj = Linear(width, hidden_size, bias=config.bias)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """`x: [T, D]` → [T, D], any rows: an expert is given those that were routed to it."""
        gate, up = outputs_of((self.gate_proj, self.up_proj), x, context)
        return self.down_proj(gated(gate, up, self.activation), context)
