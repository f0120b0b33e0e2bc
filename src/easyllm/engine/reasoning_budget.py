"""A bound on the number of tokens that a model reasons before it answers."""

from enum import Enum, auto

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError
from easyllm.engine.request import MaskSource, TokenMask
from easyllm.tokenizer.reasoning import ReasoningFormat
from easyllm.tokenizer.tokenizer import Tokenizer


class ReasoningBudget:
    """Masks that close the reasoning of a completion when it reaches a number of tokens.

    The tokens after the opening mark are counted; when there are `budget` of them and the reasoning
    is still open, only the tokens of its closing mark are allowed, one after the other. A budget of
    0 closes it at once.

    Args:
        budget: maximum number of tokens between the marks.
        reasoning: the marks.
        tokenizer: the tokenizer of the model.
        starts_in_reasoning: whether the prompt has opened the reasoning.
        inner: further masks; the closing mark is forced only where they allow it.

    Raises:
        ConfigError: the budget is negative.

    Example:
        budget = ReasoningBudget(256, tokenizer.reasoning, tokenizer, starts_in_reasoning=True)
        request = Request(prompt_ids=ids, params=params, mask=budget)
    """

    def __init__(
        self,
        budget: int,
        reasoning: ReasoningFormat,
        tokenizer: Tokenizer,
        *,
        starts_in_reasoning: bool = False,
        inner: MaskSource | None = None,
    ) -> None:
        if budget < 0:
            raise ConfigError(f"the reasoning budget is {budget} tokens; give 0 or more")
        self.budget, self.tokenizer = budget, tokenizer
        self.open, self.close = reasoning.open.encode(), reasoning.close.encode()
        self.starts_in_reasoning, self._inner = starts_in_reasoning, inner
        known = reasoning.ids.get(reasoning.close)
        self.close_ids = (
            tokenizer.encode(reasoning.close, special_tokens=False) if known is None else [known]
        )

    def start(self) -> TokenMask:
        """Returns the mask of a completion that has no token yet."""
        return BudgetMask(self, None if self._inner is None else self._inner.start())


class _State(Enum):
    """Where a completion is."""

    BEFORE = auto()  # the reasoning may open
    OPEN = auto()
    CLOSING = auto()  # the closing mark is being forced
    AFTER = auto()


class BudgetMask:
    """The tokens allowed next in a completion with a reasoning budget.

    Args:
        source: the budget.
        inner: further restrictions, or None.
    """

    def __init__(self, source: ReasoningBudget, inner: TokenMask | None) -> None:
        self._source, self._inner = source, inner
        self._state = _State.OPEN if source.starts_in_reasoning else _State.BEFORE
        self._text = b""  # the end of the completion, as far as it may be part of a mark
        self._count = 0  # tokens of the reasoning
        self._closed = 0  # tokens of the closing mark that were forced

    def mask(self) -> Tensor | None:
        """Returns a bitmask [⌈V/32⌉] int32 of the tokens allowed next; None for all."""
        allowed = None if self._inner is None else self._inner.mask()
        if self._state is _State.OPEN and self._count >= self._source.budget:
            self._state = _State.CLOSING
        if self._state is not _State.CLOSING:
            return allowed
        forced = self._source.close_ids[self._closed]
        if allowed is not None and not _allows(allowed, forced):
            self._state, self._closed = _State.OPEN, 0  # within a character, for example
            return allowed
        return _only(forced)

    def advance(self, token_id: int) -> None:
        """Updates the state with a token that was appended to the completion."""
        if self._inner is not None:
            self._inner.advance(token_id)
        if self._state is _State.AFTER:
            return
        if self._state is _State.CLOSING:
            self._closed += 1
            if self._closed == len(self._source.close_ids):
                self._state = _State.AFTER
            return
        self._text += self._source.tokenizer.token_bytes(token_id) or b""
        if self._state is _State.BEFORE:
            self._look_for_opening()
        else:
            self._count += 1
            if self._source.close in self._text:
                self._state = _State.AFTER
            self._text = self._text[-len(self._source.close) :]

    def _look_for_opening(self) -> None:
        begun = self._text.lstrip()
        if begun.startswith(self._source.open):
            self._state, self._text = _State.OPEN, b""
        elif not self._source.open.startswith(begun):
            self._state = _State.AFTER


def _allows(words: Tensor, token_id: int) -> bool:
    place = token_id // 32
    return place < len(words) and bool(int(words[place]) >> (token_id % 32) & 1)


def _only(token_id: int) -> Tensor:
    """Returns a bitmask that allows a single token."""
    words = torch.zeros(token_id // 32 + 1, dtype=torch.int32)
    bit = 1 << (token_id % 32)
    words[-1] = bit - (1 << 32) if bit >= 1 << 31 else bit
    return words
