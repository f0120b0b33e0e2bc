"""Data mixtures: the number of tokens from each source, and the sampling of documents.

tokens of source i = min(budget · weight_i / Σ weights,
                         max_epochs_i · available tokens_i, max_tokens_i)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from easyllm.core.config import Config
from easyllm.core.errors import ConfigError, suggest


class Share(Config):
    """The part of one source in the mixture."""

    weight: PositiveFloat | None = Field(
        None,
        description="Share of the tokens, relative to the other weights; if no source has a "
        "weight, every document is used once.",
    )
    max_epochs: PositiveFloat = Field(
        1.0, description="Maximum number of passes over the documents of the source."
    )
    max_tokens: PositiveInt | None = Field(
        None, description="Maximum number of tokens of the source."
    )


class MixtureConfig(Config):
    """How sources are mixed."""

    shares: dict[str, Share] = Field(
        default_factory=dict,
        description="Shares by name of the source; a source that is not named is used "
        "completely, or with weight 1 if other sources have weights.",
    )
    tokens: PositiveInt | None = Field(
        None,
        description="Token budget; by default the largest that all sources can supply at these "
        "weights within their limits.",
    )
    seed: NonNegativeInt = Field(0, description="Seed of the sampling.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """What the mixture contains of one source.

    Attributes:
        wanted: number of tokens planned.
        tokens: number of tokens of the sampled documents.
        available: number of tokens of the source.
        documents: number of sampled documents.
    """

    wanted: int
    tokens: int
    available: int
    documents: int

    @property
    def epochs(self) -> float:
        """The number of passes over the source: tokens / available."""
        return self.tokens / self.available if self.available else 0.0

    def as_dict(self) -> dict[str, float]:
        """Returns the composition as a JSON-serializable dict."""
        return {
            "tokens": self.tokens,
            "wanted": self.wanted,
            "available": self.available,
            "documents": self.documents,
            "epochs": round(self.epochs, 6),
        }


def plan_tokens(config: MixtureConfig, available: Mapping[str, int]) -> dict[str, int]:
    """Returns the number of tokens to sample from each source.

    Args:
        config: the mixture.
        available: source name -> number of tokens that it has.

    Raises:
        ConfigError: a share names an unknown source, or a source with a weight is empty.
    """
    for name, share in config.shares.items():
        if name not in available:
            raise ConfigError(
                f"mixture.shares names {name!r}, which is not a source{suggest(name, available)}"
            )
        if share.weight is not None and available[name] == 0:
            raise ConfigError(
                f"mixture gives weight {share.weight:g} to source {name!r}, but no documents "
                "remain from it; drop the weight, or loosen the rules that rejected them"
            )
    shares = {name: config.shares.get(name, Share()) for name in available}
    most = {name: _most(shares[name], have) for name, have in available.items()}
    weighted = config.tokens is not None or any(s.weight is not None for s in shares.values())
    if not weighted:
        return most
    present = [name for name, have in available.items() if have]
    weights = {name: _weight(shares[name], config, available[name]) for name in present}
    total = sum(weights.values())
    budget = config.tokens
    if budget is None:
        budget = int(min(most[name] * total / weights[name] for name in present)) if present else 0
    wanted = {name: min(most[name], round(budget * weights[name] / total)) for name in present}
    return {name: wanted.get(name, 0) for name in available}


def choose_documents(
    lengths: NDArray[np.int64], wanted: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Samples documents, epoch by epoch in a new random order, until `wanted` tokens are reached.

    The last document is the one with which the total reaches `wanted`.

    Args:
        lengths: [n] int64, number of tokens of every document.
        wanted: number of tokens.
        generator: determines the order.

    Returns:
        The indices of the documents, with repetitions if there is more than one epoch.
    """
    total = int(lengths.sum())
    if total == 0 or wanted <= 0:
        return np.empty(0, dtype=np.int64)
    chosen = []
    while wanted > 0:
        order = generator.permutation(len(lengths))
        filled = np.cumsum(lengths[order])
        count = int(np.searchsorted(filled, wanted)) + 1
        chosen.append(order[:count])
        wanted -= int(filled[min(count, len(order)) - 1])
    return np.concatenate(chosen)


def _most(share: Share, have: int) -> int:
    most = int(have * share.max_epochs)
    return most if share.max_tokens is None else min(most, share.max_tokens)


def _weight(share: Share, config: MixtureConfig, have: int) -> float:
    """Returns the weight of a source; if no source has one, the weight is its number of tokens."""
    if share.weight is not None:
        return share.weight
    return 1.0 if any(s.weight is not None for s in config.shares.values()) else float(have)
