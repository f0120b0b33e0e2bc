"""RoPE: queries and keys are rotated by their positions; and the cost of position encodings."""

import torch
from torch import Tensor, nn

from easyllm.nn.context import ForwardContext
from easyllm.nn.cost import FP32, Activation, CostTrace, Scores
from easyllm.nn.position_config import BY_LENGTH, BlockRope, Rope
from easyllm.nn.rope_scaling import frequencies, rope_frequencies
from easyllm.ops.attention_rule import ScoreTerms
from easyllm.ops.rotary import apply_rotary


class PositionCost:
    """Base class for the cost of a position encoding; the default is the cost of no encoding.

    Attributes:
        mask_per_head: whether a floating-point mask per head is added to the scores; with
            `trained_mask` the mask has a gradient.
        materializes_scores: whether scores and weights are materialised, instead of a tiled kernel.
        rotates_in_scores: whether queries and keys are rotated in the score function, once for near
            and once for far pairs.
        learns_from_queries: whether it has learned vectors whose gradients need the queries.
    """

    mask_per_head = trained_mask = materializes_scores = False
    rotates_in_scores = learns_from_queries = False

    def cost(self, trace: CostTrace, x: Activation) -> Activation:  # noqa: ARG002 - for rotations
        """Records the cost of `rotate` and returns its output."""
        return x

    def table_elements(self) -> dict[object, int]:
        """Returns the fp32 elements per token of each table, by its key.

        Tables are computed once per forward pass; layers with the same key share a table.
        """
        return {}

    def keep_scores(self, trace: CostTrace, scores: Scores) -> None:
        """Records what autograd saves for materialised scores.

        Queries, keys, values and weights are not included.
        """
        if self.rotates_in_scores:
            trace.keep("rectified", 4 * trace.work.tokens * scores.heads * scores.dim * FP32)

    def score_products(self, trace: CostTrace, scores: Scores) -> None:
        """Records the matrix products in addition to q kᵀ and weights · v."""
        if self.rotates_in_scores:
            trace.product("scores", scores.flops, scores.flops * (scores.q.grad + scores.k.grad))


class RotaryPosition(PositionCost, nn.Module):
    """RoPE: rotates each pair by position · θ^(-2i/d) (arXiv 2104.09864, eq. 34).

    The dot products of rotated queries and keys depend only on the difference of their positions.
    """

    terms: ScoreTerms | None = None

    def __init__(self, config: Rope, head_dim: int) -> None:
        super().__init__()
        self.config, self.width = config, config.rotary_dim or head_dim
        self.head_dim = head_dim

    def rotate(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Returns `x: [T, heads, d]` rotated by `context.positions`."""
        cos, sin = context.once((self.config, self.width), lambda: self.tables(context))
        if self.width == self.head_dim:
            return apply_rotary(x, cos, sin, interleaved=self.config.interleaved)
        rotated, rest = x.split([self.width, self.head_dim - self.width], dim=-1)
        rotated = apply_rotary(rotated.contiguous(), cos, sin, interleaved=self.config.interleaved)
        return torch.cat([rotated, rest], dim=-1)

    def cost(self, trace: CostTrace, x: Activation) -> Activation:  # noqa: ARG002 - interface
        """Returns a new tensor; the tables belong to the model, not to a layer."""
        return Activation(f"{x.name}.turned", x.nbytes, x.grad)

    def table_elements(self) -> dict[object, int]:
        """Returns the elements of cos and sin, half the rotated width each."""
        return {(self.config, self.width): self.width}

    def tables(self, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Returns cos and sin of all angles, both [T, d/2] fp32, with the scaling's factor."""
        positions = context.positions
        if isinstance(self.config.scaling, BY_LENGTH) and context.lengths:
            parts = [self._angles(part) for part in positions.split(context.lengths)]
            angles, factor = torch.cat([part for part, _ in parts]), parts[0][1]
        else:
            angles, factor = self._angles(positions)
        return angles.cos() * factor, angles.sin() * factor

    def _angles(self, positions: Tensor) -> tuple[Tensor, float]:
        """The angles [T, d/2] and the factor on cos and sin; the maximum sets the length."""
        length = int(positions.max()) + 1 if positions.numel() else 1
        frequencies, factor = rope_frequencies(self.config, self.width, length)
        return positions.float()[:, None] * frequencies.to(positions.device), factor


class NoRotation(PositionCost, nn.Module):
    """Leaves queries and keys unrotated."""

    terms: ScoreTerms | None = None

    def rotate(self, x: Tensor, context: ForwardContext) -> Tensor:  # noqa: ARG002 - for rotations
        """Returns `x` unchanged."""
        return x


class BlockRotaryPosition(PositionCost, nn.Module):
    """2-D RoPE of ChatGLM-6B: half of the pairs rotate by each of the two positions of a token.

    The positions are the two of GLM, in the text and in the generated block (Du et al. 2021, arXiv
    2103.10360, section 2.2.1), `context.position_rows`. Pair i of d/2 rotates by the first position
    times θ^(-4i/d) for i < d/4, and by the second one times θ^(-4(i - d/4)/d) after that.
    """

    terms: ScoreTerms | None = None

    def __init__(self, config: BlockRope, head_dim: int) -> None:
        super().__init__()
        self.config, self.head_dim = config, head_dim

    def rotate(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Returns `x: [T, heads, d]` rotated by both positions of each token."""
        cos, sin = context.once((self.config, self.head_dim), lambda: self.tables(context))
        return apply_rotary(x, cos, sin)

    def cost(self, trace: CostTrace, x: Activation) -> Activation:  # noqa: ARG002 - interface
        """Returns a new tensor; the tables belong to the model, not to a layer."""
        return Activation(f"{x.name}.turned", x.nbytes, x.grad)

    def table_elements(self) -> dict[object, int]:
        """Returns the elements of cos and sin, half the rotated width each."""
        return {(self.config, self.head_dim): self.head_dim}

    def tables(self, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Returns cos and sin of all angles, both [T, d/2] fp32."""
        rows = context.position_rows
        if rows is None:
            rows = torch.stack([context.positions, torch.zeros_like(context.positions)])
        speeds = frequencies(self.config.theta, self.head_dim // 2).to(rows.device)
        angles = rows.float()[:, :, None] * speeds  # [2, T, d/4]
        both = torch.cat([angles[0], angles[1]], dim=-1)
        return both.cos(), both.sin()
