"""Positions: how a token's place in its sequence reaches attention."""

from typing import Protocol

import torch
from torch import Tensor, nn

from easyllm.nn.config import NoPosition, Rope
from easyllm.ops.attention import AttentionContext
from easyllm.ops.rotary import apply_rotary


class PositionModule(Protocol):
    """What an attention layer asks of its positions."""

    def rotate(self, x: Tensor, context: AttentionContext) -> Tensor:
        """`x: [T, heads, d]` turned by `context.positions` (the identity where nothing turns)."""


class RotaryPosition(nn.Module):
    """Rotates each pair (x_i, x_{i+d/2}) by position · θ^(-2i/d) (arXiv 2104.09864, eq. 34).

    The products of rotated queries and keys depend on the difference of their positions only.
    """

    def __init__(self, config: Rope, head_dim: int) -> None:
        super().__init__()
        self.config, self.head_dim = config, head_dim

    def rotate(self, x: Tensor, context: AttentionContext) -> Tensor:
        cos, sin = context.once(
            (self.config, self.head_dim), lambda: self.tables(context.positions)
        )
        return apply_rotary(x, cos, sin)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of every angle: two [T, d/2] in fp32."""
        exponents = torch.arange(0, self.head_dim, 2, device=positions.device).float()
        frequencies = 1.0 / self.config.theta ** (exponents / self.head_dim)
        angles = positions.float()[:, None] * frequencies
        return angles.cos(), angles.sin()


class NoRotation(nn.Module):
    """Leaves queries and keys as they are."""

    def rotate(self, x: Tensor, context: AttentionContext) -> Tensor:
        return x


def build_position(config: Rope | NoPosition, head_dim: int) -> PositionModule:
    """The position module a configuration names."""
    if isinstance(config, Rope):
        return RotaryPosition(config, head_dim)
    return NoRotation()
