"""Requests and token events: the engine's input and output types."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from easyllm.engine.params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled"]
_numbers = itertools.count()


class TokenMask(Protocol):
    """The tokens allowed next in one completion; the interface for guided decoding.

    An exception in either method, or a mask of invalid shape or dtype, ends the completion as
    `cancelled`; the traceback is logged. A mask may also have:

    - `allows(token_id) -> bool`: whether one token is certainly allowed. Greedy decoding asks this
      about the most likely token, and computes the mask only if the answer is no;
    - `computer`: a `MaskComputer`, which computes the masks of several completions at once.
    """

    def mask(self) -> Tensor | None:
        """Returns a bitmask of the tokens allowed next.

        Returns:
            [⌈V/32⌉] int32: bit t mod 32 of word t / 32 is set if token t is allowed. Missing words
            at the end count as zero. None allows all tokens; if no bit is set, the completion ends.
        """

    def advance(self, token_id: int) -> None:
        """Updates the state with a token that was appended to the completion, including EOS."""


class MaskComputer(Protocol):
    """Computes the masks of several completions at once, which is faster than one by one."""

    def compute(self, masks: Sequence[TokenMask], /) -> None:
        """Computes what `mask` of each of the masks will return."""


class MaskSource(Protocol):
    """Creates the masks of a request: one per completion, because each has its own state."""

    def start(self) -> TokenMask:
        """Returns the mask of a completion that has no token yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt with its sampling parameters.

    Attributes:
        prompt_ids: token ids of the prompt.
        params: sampling parameters.
        adapter: name of the adapter to use; empty for the base model, or for an adapter without a
            name, which applies to every row.
        salt: cached prefixes are shared only among requests with the same adapter and salt.
        mask: restricts the allowed tokens step by step (guided decoding).
        id: id of the request, unique in this process.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    adapter: str = ""
    salt: str = ""
    mask: MaskSource | None = None
    id: int = field(default_factory=lambda: next(_numbers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """Log-probabilities in nats at one position of a text.

    Attributes:
        token_id: the token at this position.
        raw: log-probability of that token under the model's own distribution.
        top_raw: (id, log-probability) of the most likely tokens under that distribution, most
            likely first.
        processed, top_processed: the same under the distribution the token was chosen from (after
            penalties, bias, mask, temperature, top-k ...); None for prompt tokens.
        entropy: entropy of the model's own distribution; None for prompt tokens.
        removed_mass: probability, under that distribution, of the tokens that could not be chosen
            because of the mask (guided decoding), banned n-grams or the minimum length.
        removed: ids of those among `top_raw`.
    """

    token_id: int
    raw: float
    top_raw: tuple[tuple[int, float], ...]
    processed: float | None = None
    top_processed: tuple[tuple[int, float], ...] | None = None
    entropy: float | None = None
    removed_mass: float = 0.0
    removed: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """The result of a step for one completion of a request.

    Attributes:
        request_id: id of the request.
        token_id: the new token; None if the event only contains held-back text or the end.
        text: the new text that is final; may be empty.
        logprob: log-probability of the token in nats under the unmodified (raw) distribution.
        finish_reason: set on the last event of a completion.
        index: index of the completion within the request.
        logprobs: log-probabilities of the token, if requested.
        prompt_logprobs: log-probabilities of each prompt token after the first, if requested; on
            the first event of a completion only.
        stop: the stop string, or the id from `SamplingParams.stop_token_ids`, that ended the
            completion; None if something else did.
        cached_tokens: number of prompt tokens whose keys and values came from the prefix cache; on
            the first event of a completion only.
    """

    request_id: int
    token_id: int | None
    text: str
    logprob: float
    finish_reason: FinishReason | None = None
    index: int = 0
    logprobs: Logprobs | None = None
    prompt_logprobs: tuple[Logprobs, ...] | None = None
    stop: str | int | None = None
    cached_tokens: int = 0
