"""Position encodings that are added to the embedding: learned and sinusoidal."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easyllm.core.errors import ConfigError
from easyllm.nn.position_config import Learned, NoPosition, Sinusoidal


class LearnedEmbedding(nn.Module):
    """Adds a learned vector per position."""

    def __init__(self, max_seq_len: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_seq_len, hidden_size))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Returns `x: [T, D]` plus the vectors of `positions: [T]`.

        Raises:
            ConfigError: a position is beyond the table.
        """
        last = int(positions.max()) if positions.numel() else 0
        if last >= len(self.weight):
            raise ConfigError(
                f"position {last} is beyond the learned table of {len(self.weight)} positions; "
                "shorten the sequence, or use a model with positions that extrapolate"
            )
        return x + F.embedding(positions, self.weight)

    def reset_parameters(self) -> None:
        """Initialises the vectors from N(0, 0.02²)."""
        nn.init.normal_(self.weight, std=0.02)


class SinusoidalEmbedding(nn.Module):
    """Adds sinusoidal positions: sin(t ω_i) and cos(t ω_i), interleaved, with ω_i = base^(-2i/D).

    See arXiv 1706.03762, section 3.5.
    """

    def __init__(self, config: Sinusoidal, hidden_size: int) -> None:
        super().__init__()
        self.config, self.width = config, hidden_size

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Returns `x: [T, D]` plus the table's rows for `positions: [T]`."""
        return x + self.table(positions).to(x.dtype)

    def table(self, positions: Tensor) -> Tensor:
        """Returns the vectors of `positions: [T]`, [T, D] fp32."""
        exponents = torch.arange(0, self.width, 2, device=positions.device).float() / self.width
        angles = positions.float()[:, None] / self.config.base**exponents
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class NoEmbeddingPosition(nn.Module):
    """Adds nothing."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002 - for the others
        """Returns `x` unchanged."""
        return x


def build_embedding_position(
    config: Learned | Sinusoidal | NoPosition, max_seq_len: int, hidden_size: int
) -> nn.Module:
    """Returns the module that adds positions to the embedding, for a model's configuration."""
    match config:
        case Learned():
            return LearnedEmbedding(max_seq_len, hidden_size)
        case Sinusoidal():
            return SinusoidalEmbedding(config, hidden_size)
        case NoPosition():
            return NoEmbeddingPosition()
