"""Position encodings that are added to the embedding: learned, GLM's two, and sinusoidal."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easyllm.core.errors import ConfigError
from easyllm.nn.position_config import BlockLearned, Learned, NoPosition, Sinusoidal


class LearnedEmbedding(nn.Module):
    """Adds a learned vector per position."""

    def __init__(self, max_seq_len: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_seq_len, hidden_size))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        rows: Tensor | None = None,  # noqa: ARG002 - for GLM's
    ) -> Tensor:
        """Returns `x: [T, D]` plus the vectors of `positions: [T]`.

        Raises:
            ConfigError: a position is beyond the table.
        """
        return x + _looked_up(self.weight, positions)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialises the vectors from N(0, 0.02²)."""
        nn.init.normal_(self.weight, std=0.02, generator=generator)


class BlockLearnedEmbedding(nn.Module):
    """Adds a learned vector for each of GLM's two positions (Du et al. 2021, arXiv 2103.10360).

    See section 2.2.1: the position in the text, and that in the generated block, 0 in the text.
    """

    def __init__(self, max_seq_len: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_seq_len + 1, hidden_size))
        self.block_weight = nn.Parameter(torch.empty(max_seq_len + 1, hidden_size))

    def forward(self, x: Tensor, positions: Tensor, rows: Tensor | None = None) -> Tensor:
        """Returns `x: [T, D]` plus the vectors of the position rows: [2, T].

        Raises:
            ConfigError: a position is beyond a table.
        """
        if rows is None:
            rows = torch.stack([positions, torch.zeros_like(positions)])
        x = x + _looked_up(self.weight, rows[0])
        return x + _looked_up(self.block_weight, rows[1])

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialises the vectors from N(0, 0.02²)."""
        nn.init.normal_(self.weight, std=0.02, generator=generator)
        nn.init.normal_(self.block_weight, std=0.02, generator=generator)


def _looked_up(table: Tensor, positions: Tensor) -> Tensor:
    """Returns the rows of a table.

    Raises:
        ConfigError: a position is beyond it.
    """
    last = int(positions.max()) if positions.numel() else 0
    if last >= len(table):
        raise ConfigError(
            f"position {last} is beyond the learned table of {len(table)} positions; "
            "shorten the sequence, or use a model with positions that extrapolate"
        )
    return F.embedding(positions, table)


class SinusoidalEmbedding(nn.Module):
    """Adds sinusoidal positions: sin(t ω_i) and cos(t ω_i), interleaved, with ω_i = base^(-2i/D).

    See arXiv 1706.03762, section 3.5.
    """

    def __init__(self, config: Sinusoidal, hidden_size: int) -> None:
        super().__init__()
        self.config, self.width = config, hidden_size

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        rows: Tensor | None = None,  # noqa: ARG002 - for GLM's
    ) -> Tensor:
        """Returns `x: [T, D]` plus the table's rows for `positions: [T]`."""
        return x + self.table(positions).to(x.dtype)

    def table(self, positions: Tensor) -> Tensor:
        """Returns the vectors of `positions: [T]`, [T, D] fp32."""
        exponents = torch.arange(0, self.width, 2, device=positions.device).float() / self.width
        angles = positions.float()[:, None] / self.config.base**exponents
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class NoEmbeddingPosition(nn.Module):
    """Adds nothing."""

    def forward(
        self,
        x: Tensor,
        positions: Tensor,  # noqa: ARG002 - for the others
        rows: Tensor | None = None,  # noqa: ARG002 - for the others
    ) -> Tensor:
        """Returns `x` unchanged."""
        return x


def build_embedding_position(
    config: Learned | BlockLearned | Sinusoidal | NoPosition, max_seq_len: int, hidden_size: int
) -> nn.Module:
    """Returns the module that adds positions to the embedding, for a model's configuration."""
    match config:
        case Learned():
            return LearnedEmbedding(max_seq_len, hidden_size)
        case BlockLearned():
            return BlockLearnedEmbedding(max_seq_len, hidden_size)
        case Sinusoidal():
            return SinusoidalEmbedding(config, hidden_size)
        case NoPosition():
            return NoEmbeddingPosition()
