"""Feed-forward blocks."""

from torch import Tensor, nn

from easyllm.nn.config import FeedForward, GLUConfig, MLPConfig, MoEConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.cost import Activation, CostTrace
from easyllm.nn.glu import GLU, KEEP_RESULT
from easyllm.nn.linear import Linear
from easyllm.nn.moe import MoE
from easyllm.ops.activation import ACTIVATIONS


class MLP(nn.Module):
    """down(act(up(x))) (arXiv 1706.03762, eq. 2)."""

    def __init__(self, config: MLPConfig, hidden_size: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.keeps_result = config.activation in KEEP_RESULT
        self.up_proj = Linear(hidden_size, config.intermediate_size, bias=config.bias)
        self.down_proj = Linear(config.intermediate_size, hidden_size, bias=config.bias)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """`x: [T, D]` → [T, D]."""
        return self.down_proj(self.activation(self.up_proj(x, context)), context)

    def cost(self, trace: CostTrace, x: Activation) -> Activation:
        """Two products; of the activation autograd keeps input or result."""
        up = trace.linear(self.up_proj, "up_proj", x, part="feed_forward")
        act = Activation("act", up.nbytes, up.grad)
        if act.grad:
            trace.keep_all(act if self.keeps_result else up)
        return trace.linear(self.down_proj, "down_proj", act, part="feed_forward")

    def inner_elements(self, rows: int) -> int:
        """Of the widest tensors that are there at once: before and after the activation."""
        return 2 * rows * self.up_proj.out_features


def build_feed_forward(config: FeedForward, hidden_size: int, layer: int) -> nn.Module:
    """The feed-forward a configuration names; each is called with hidden states and the batch's context."""
    match config:
        case GLUConfig():
            return GLU(config, hidden_size)
        case MLPConfig():
            return MLP(config, hidden_size)
        case MoEConfig():
            return MoE(config, hidden_size, layer)
