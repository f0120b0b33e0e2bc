"""Gated feed-forward (GLU), used as the block of a layer and as an expert of an MoE."""

from functools import partial

from torch import Tensor, nn

from easyllm.nn.config import GLUConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.cost import Activation, CostTrace
from easyllm.nn.linear import Linear, fused_linears
from easyllm.ops.activation import gated

KEEP_RESULT = ("relu", "sigmoid")
"""Activations whose derivative is a function of their result, so that autograd saves the result."""


class GLU(nn.Module):
    """Gated feed-forward: down(act(gate(x)) ⊙ up(x)) (arXiv 2002.05202, eqs. 5 and 6)."""

    def __init__(self, config: GLUConfig, hidden_size: int) -> None:
        super().__init__()
        self.activation = config.activation
        width = config.intermediate_size
        self.gate_proj = Linear(hidden_size, width, bias=config.bias)
        self.up_proj = Linear(hidden_size, width, bias=config.bias)
        self.down_proj = Linear(width, hidden_size, bias=config.bias)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Returns the output [T, D] for `x: [T, D]`; an expert gets only the rows routed to it."""
        gate, up = fused_linears((self.gate_proj, self.up_proj), x, context)
        return self.down_proj(gated(gate, up, self.activation), context)

    def cost(
        self,
        trace: CostTrace,
        x: Activation,
        *,
        rows: int | None = None,
        copies: int = 1,
        prefix: str = "",
    ) -> Activation:
        """Records three matrix products and the tensors that autograd saves.

        With SiLU only gate and up are saved, and the rest is recomputed.

        Args:
            rows: total number of rows of `copies` experts; by default one per token.
            copies: number of experts.
            prefix: prefix of tensor names.
        """
        run = partial(trace.linear, part="feed_forward", rows=rows, copies=copies, prefix=prefix)
        gate = run(self.gate_proj, "gate_proj", x)
        up = run(self.up_proj, "up_proj", x)
        act = Activation(f"{prefix}act", gate.nbytes, gate.grad or up.grad)
        if act.grad and self.activation == "silu":
            trace.keep_all(gate, up)
        elif act.grad:
            if self.activation not in KEEP_RESULT:
                trace.keep_all(gate)
            trace.keep_all(Activation(f"{prefix}gate.act", act.nbytes, grad=True), up)
        return run(self.down_proj, "down_proj", act)

    def inner_elements(self, rows: int) -> int:
        """Returns the elements of the widest live tensors: gate, up and their product."""
        return 3 * rows * self.gate_proj.out_features
