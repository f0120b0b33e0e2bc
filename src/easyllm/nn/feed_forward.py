"""Feed-forward blocks: the MLP without a gate, and the choice of block by configuration."""

from torch import Tensor, nn

from easyllm.nn.config import FeedForward, GLUConfig, MLPConfig, MoEConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.cost import Activation, CostTrace
from easyllm.nn.glu import GLU, KEEP_RESULT
from easyllm.nn.linear import Linear
from easyllm.nn.moe import MoE
from easyllm.ops.activation import ACTIVATIONS


class MLP(nn.Module):
    """Feed-forward without a gate: down(act(up(x))) (arXiv 1706.03762, eq. 2)."""

    def __init__(self, config: MLPConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.activation = ACTIVATIONS[config.activation]
        self.keeps_result = config.activation in KEEP_RESULT
        self.up_proj = Linear(hidden_size, config.intermediate_size, bias=config.bias)
        self.down_proj = Linear(config.intermediate_size, hidden_size, bias=config.bias)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Returns the output [T, D] for `x: [T, D]`."""
        return self.down_proj(self.activation(self.up_proj(x, context)), context)

    def cost(self, trace: CostTrace, x: Activation) -> Activation:
        """Records two matrix products; autograd saves the input or the result of the activation."""
        up = trace.linear(self.up_proj, "up_proj", x, part="feed_forward")
        act = Activation("act", up.nbytes, up.grad)
        if act.grad:
            trace.keep_all(act if self.keeps_result else up)
        return trace.linear(self.down_proj, "down_proj", act, part="feed_forward")

    def inner_elements(self, rows: int) -> int:
        """Returns the elements of the widest live tensors: before and after the activation."""
        return 2 * rows * self.up_proj.out_features


def build_feed_forward(config: FeedForward, hidden_size: int, layer: int) -> nn.Module:
    """Returns the feed-forward module for a configuration.

    Each is called with the hidden states and the context of the forward pass.
    """
    match config:
        case GLUConfig():
            return GLU(config, hidden_size)
        case MLPConfig():
            return MLP(config, hidden_size)
        case MoEConfig():
            return MoE(config, hidden_size, layer)
