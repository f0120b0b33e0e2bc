"""Mixtures: how many tokens of each source, and the order of documents.

tokens of source i = budget · weight_i / Σ weights, at most epochs_i · (tokens it has), at most cap_i
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from easyllm.core.config import Config
from easyllm.core.errors import ConfigError, suggest


class Share(Config):
    """A source's part of the mixture.

    Attributes:
        weight: its share of the tokens, relative to the others'; without any weights all documents are taken once.
        max_epochs: how often its documents may be repeated.
        max_tokens: most tokens of it.
    """

    weight: PositiveFloat | None = None
    max_epochs: PositiveFloat = 1.0
    max_tokens: PositiveInt | None = None


class MixtureConfig(Config):
    """Shares by source name; sources that are not named are taken whole, or by weight 1 where others have weights."""

    shares: dict[str, Share] = Field(default_factory=dict)
    tokens: PositiveInt | None = None
    """The budget; by default as much as the scarcest source allows at these weights."""
    seed: NonNegativeInt = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """What the mixture took of a source: the tokens wanted and got, of those it has, and epochs = got / has."""

    wanted: int
    tokens: int
    available: int
    documents: int

    @property
    def epochs(self) -> float:
        return self.tokens / self.available if self.available else 0.0

    def as_dict(self) -> dict[str, float]:
        return {
            "tokens": self.tokens,
            "wanted": self.wanted,
            "available": self.available,
            "documents": self.documents,
            "epochs": round(self.epochs, 6),
        }


def plan_tokens(config: MixtureConfig, available: Mapping[str, int]) -> dict[str, int]:
    """Tokens wanted of each source.

    Raises:
        ConfigError: a share names no source, or a source with a weight is empty.
    """
    for name, share in config.shares.items():
        if name not in available:
            raise ConfigError(
                f"mixture.shares names {name!r}, which is no source{suggest(name, available)}"
            )
        if share.weight is not None and available[name] == 0:
            raise ConfigError(
                f"mixture gives weight {share.weight:g} to source {name!r}, of which no document is left; "
                "drop the weight, or loosen the rules that rejected it"
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
    """Numbers of documents, epoch after epoch in a fresh order, until `wanted` tokens are reached; the document that
    crosses the mark is the last."""
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
    """Its weight; where no source has one, a budget is shared by size."""
    if share.weight is not None:
        return share.weight
    return 1.0 if any(s.weight is not None for s in config.shares.values()) else float(have)
