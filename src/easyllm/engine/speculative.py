"""Speculative decoding: a drafter proposes draft tokens, which one pass of the model verifies.

With greedy decoding, a draft token is accepted if it is the token that the model would have chosen,
so the output is the same with and without a drafter. With sampling, a draft token sampled from a
distribution q is accepted with probability min(1, p / q), and otherwise replaced by a token sampled
from max(0, p - q) normalized, which leaves the distribution of tokens unchanged (Leviathan et al.
2022, arXiv 2211.17192, section 2.3). A draft token that was not sampled (of an n-gram) is accepted
if it equals the sampled token, so that with a seed even the tokens are the same.
"""

from collections.abc import Sequence
from typing import Protocol

from easyllm.core.errors import ConfigError
from easyllm.engine.generation import Generation
from easyllm.engine.sampling import Draft
from easyllm.nn.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    ModelConfig,
)
from easyllm.nn.position_config import BY_LENGTH, Rope


class Drafter(Protocol):
    """Proposes draft tokens."""

    def check(self, target: ModelConfig) -> None:
        """Refuses target models that the drafter does not support.

        Raises:
            ConfigError: the drafter does not support the model.
        """

    def propose(self, generations: Sequence[Generation]) -> dict[int, tuple[Draft, ...]]:
        """Returns draft tokens for the next tokens of completions, by sequence id.

        A completion without draft tokens may be missing.
        """

    def forget(self, sequence_id: int) -> None:
        """Discards the state of a sequence that has ended."""


class NgramDrafter:
    """Prompt lookup decoding (Saxena 2023): drafts from earlier occurrences of the last n-gram.

    The draft tokens are those that followed the latest earlier occurrence.

    Args:
        num_tokens: maximum number of draft tokens per step.
        longest, shortest: bounds of the n-gram length n; the longest is tried first.
    """

    def __init__(self, num_tokens: int = 5, *, longest: int = 3, shortest: int = 1) -> None:
        self.num_tokens, self.longest, self.shortest = num_tokens, longest, shortest

    def check(self, target: ModelConfig) -> None:
        """Refuses models with recurrent states, and those whose keys depend on the pass length.

        Raises:
            ConfigError: it is such a model.
        """
        refuse_recurrent_states(target)
        refuse_length_dependent_keys(target)

    def propose(self, generations: Sequence[Generation]) -> dict[int, tuple[Draft, ...]]:
        """Returns draft tokens for each completion whose last n-gram occurs earlier in its text."""
        found = {}
        for generation in generations:
            if guesses := self.lookup(generation.sequence.tokens):
                found[generation.sequence.id] = tuple(Draft(token_id=i) for i in guesses)
        return found

    def lookup(self, tokens: Sequence[int]) -> list[int]:
        """Returns the tokens that followed the latest earlier occurrence of the longest n-gram.

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
        """Does nothing: there is no state."""


def refuse_recurrent_states(target: ModelConfig) -> None:
    """Refuses a model with a recurrent state, which cannot be rolled back by a token.

    Raises:
        ConfigError: the model has a layer of linear attention.
    """
    if any(isinstance(layer.mixer, LinearAttentionConfig) for layer in target.layers):
        raise ConfigError(
            "speculative decoding rolls back rejected draft tokens, which a layer of linear "
            "attention cannot do; leave out the draft"
        )


def refuse_length_dependent_keys(target: ModelConfig) -> None:
    """Refuses a model whose rotated keys depend on the length of the pass that computed them.

    A pass over draft tokens is longer than the passes that it replaces, so the output would change.

    Raises:
        ConfigError: the model uses dynamic NTK scaling or LongRoPE.
    """
    if keys_depend_on_length(target):
        raise ConfigError(
            "speculative decoding verifies several tokens in one pass, and dynamic NTK and "
            "LongRoPE rotate keys by the length of a pass, so the output would change; leave out "
            "the draft, or use another --rope method"
        )


def keys_depend_on_length(config: ModelConfig) -> bool:
    """Whether rotated keys depend on the length of the pass that computed them.

    They do in dynamic NTK scaling and in LongRoPE. Such keys cannot be reused by a pass of
    another length.
    """
    mixers = (layer.mixer for layer in config.layers)
    ropes = [m.position for m in mixers if isinstance(m, AttentionConfig | LatentAttentionConfig)]
    return any(isinstance(r, Rope) and isinstance(r.scaling, BY_LENGTH) for r in ropes)
