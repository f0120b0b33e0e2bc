"""Speculative decoding: somebody guesses the next tokens, one pass of the model checks all guesses.

A guess is right where it is the token the model would have chosen, so greedy output is the same with and without. Where
tokens are drawn, a guess from a distribution q is taken with probability min(1, p / q) and replaced from max(0, p - q)
otherwise, which leaves the distribution of tokens as it is (Leviathan et al. 2022, arXiv 2211.17192, section 2.3). A guess that was not
drawn (an n-gram's) is right where it equals the drawn token: with a seed even the tokens are the same.
"""

from collections.abc import Sequence
from typing import Protocol

from easyllm.core.errors import ConfigError
from easyllm.engine.generation import Generation
from easyllm.engine.sampling import Draft
from easyllm.nn.config import (
    AttentionConfig,
    DynamicNTKScaling,
    LinearAttentionConfig,
    ModelConfig,
    Rope,
)


class Drafter(Protocol):
    """Guesses tokens."""

    def check(self, target: ModelConfig) -> None:
        """Refuses a model it cannot guess for, with a ConfigError."""

    def propose(self, generations: Sequence[Generation]) -> dict[int, tuple[Draft, ...]]:
        """Guesses for the next tokens of completions, by the id of their sequence; none is an answer, too."""

    def forget(self, sequence_id: int) -> None:
        """Drops what is kept for a sequence that has ended."""


class NgramDrafter:
    """Guesses what followed the last time the last tokens stood in the text (prompt lookup decoding, Saxena 2023).

    Args:
        num_tokens: guesses at most.
        longest, shortest: lengths of the endings that are looked up, the longest first.
    """

    def __init__(self, num_tokens: int = 5, *, longest: int = 3, shortest: int = 1) -> None:
        self.num_tokens, self.longest, self.shortest = num_tokens, longest, shortest

    def check(self, target: ModelConfig) -> None:
        """Refuses models with recurrent states, and those whose keys depend on the length of a pass."""
        refuse_states(target)
        refuse_turning_keys(target)

    def propose(self, generations: Sequence[Generation]) -> dict[int, tuple[Draft, ...]]:
        """Guesses for each completion in whose text the ending stands earlier."""
        found = {}
        for generation in generations:
            if guesses := self.lookup(generation.sequence.tokens):
                found[generation.sequence.id] = tuple(Draft(token_id=i) for i in guesses)
        return found

    def lookup(self, tokens: Sequence[int]) -> list[int]:
        """What followed the latest earlier place of the longest ending.

        >>> NgramDrafter(num_tokens=2).lookup([5, 6, 7, 8, 5, 6])
        [7, 8]
        """
        ids = list(tokens)
        for size in range(min(self.longest, len(ids) - 1), self.shortest - 1, -1):
            ending = ids[-size:]
            for start in range(len(ids) - size - 1, -1, -1):
                if ids[start : start + size] == ending:
                    return ids[start + size : start + size + self.num_tokens]
        return []

    def forget(self, sequence_id: int) -> None:
        """Nothing is kept."""


def refuse_states(target: ModelConfig) -> None:
    """Refuses a model with a layer whose state cannot go back by a token.

    Raises:
        ConfigError: there is one.
    """
    if any(isinstance(layer.mixer, LinearAttentionConfig) for layer in target.layers):
        raise ConfigError(
            "speculative decoding takes back wrong guesses, and a layer of linear attention cannot; leave the draft out"
        )


def refuse_turning_keys(target: ModelConfig) -> None:
    """Refuses a model whose keys depend on the length of the pass that made them: a pass over guesses is longer than those it
    stands for, so the output would be another.

    Raises:
        ConfigError: it is one.
    """
    if turns_keys_by_length(target):
        raise ConfigError(
            "speculative decoding checks several tokens in one pass, and dynamic NTK turns keys by the length of a pass, so the "
            "output would change; leave the draft out, or take another --rope method"
        )


def turns_keys_by_length(config: ModelConfig) -> bool:
    """Whether keys depend on the length of the pass that made them (dynamic NTK): no other pass may use them."""
    ropes = [
        layer.mixer.position for layer in config.layers if isinstance(layer.mixer, AttentionConfig)
    ]
    return any(isinstance(r, Rope) and isinstance(r.scaling, DynamicNTKScaling) for r in ropes)
