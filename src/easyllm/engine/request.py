"""Requests, sampling parameters and token events: the engine's input and output types."""

import itertools
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol

from pydantic import Field, model_validator
from torch import Tensor

from easyllm.core.config import Config

FinishReason = Literal["stop", "length", "cancelled"]
MAX_COPIES = 128
MAX_LOGPROBS = 128
MAX_COUNT = 2**31 - 1
"""Maximum integer in a request, except for its seed: beyond 64 bits, building the tensors of the
entire batch would fail."""
MAX_STOPS = 16
MAX_STOP_CHARS = 1000
"""Maximum length of a stop string: up to so much text may be held back for each completion."""
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveCount = Annotated[int, Field(ge=1, le=MAX_COUNT)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_numbers = itertools.count()


class SamplingParams(Config):
    """Sampling parameters: how tokens are chosen and when generation stops.

    Logits are processed in the order of Hugging Face's `generate`: bias, repetition penalty,
    presence and frequency penalties, repeated n-grams, minimum length, mask; then, if tokens are
    sampled: temperature, top-k, top-p, min-p, typical.

    Attributes:
        temperature: divisor of the logits; 0 selects the most likely token (greedy).
        top_k: sample only from the k most likely tokens (0: all).
        top_p: sample only from the smallest set of most likely tokens whose cumulative probability
            reaches p (nucleus sampling; Holtzman et al. 2019, arXiv 1904.09751).
        min_p: sample only from tokens whose probability is at least this fraction of that of the
            most likely token (arXiv 2407.01082).
        typical_p: sample only from the tokens whose information content is closest to the entropy,
            until their cumulative probability reaches p (arXiv 2202.00666).
        repetition_penalty: logits of tokens that occur in the prompt or output are divided by it if
            positive and multiplied by it if negative (arXiv 1909.05858, section 4.1; the scope is
            that of Hugging Face).
        presence_penalty, frequency_penalty: subtracted from the logits of tokens that occur in the
            output: once, or once per occurrence (definition and scope are OpenAI's).
        no_repeat_ngram_size: no n-gram of this size may occur twice in prompt and output (0: no
            restriction).
        logit_bias: values added to the logits of the given token ids.
        min_tokens: minimum number of tokens before an EOS token or a stop string may end the
            completion.
        seed: seed of this request; the same seed gives the same tokens whatever else is served.
        max_tokens: maximum number of tokens to generate; None continues to the end of the context.
        stop: stop strings, which end the generation and are not part of the result. At most 16, of
            at most 1,000 characters each.
        stop_token_ids: token ids that end the generation, in addition to the model's EOS tokens.
        ignore_eos: continues past the model's EOS tokens (for benchmarks).
        logprobs: number of most likely tokens to report for each token, under the raw and the
            processed distribution (None: none).
        prompt_logprobs: the same for the prompt tokens, under the raw distribution; disables prefix
            caching for the request.
        n: number of completions of the prompt.
        best_of: number of completions to generate; the `n` with the highest mean log-probability
            are returned (only after all have ended, when the best are known).
    """

    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    top_k: Count = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    typical_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    no_repeat_ngram_size: Count = 0
    logit_bias: dict[Count, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default={}, max_length=1024
    )
    min_tokens: Count = 0
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    max_tokens: PositiveCount | None = None
    stop: tuple[StopString, ...] = Field(default=(), max_length=MAX_STOPS)
    stop_token_ids: tuple[Count, ...] = ()
    ignore_eos: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_COPIES)] = 1
    best_of: Annotated[int, Field(ge=1, le=MAX_COPIES)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "SamplingParams":
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(
                f"best_of={self.best_of} is less than n={self.n}; raise best_of or lower n"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; lower it"
            )
        return self

    @property
    def num_sequences(self) -> int:
        """Number of completions to generate."""
        return self.best_of or self.n


class BeamParams(Config):
    """Parameters of beam search.

    Attributes:
        num_beams: number of running hypotheses (beam width).
        max_tokens: maximum length of a hypothesis; None continues to the end of the context.
        length_penalty: α of the score Σ log p / length^α, or with `gnmt` of
            Σ log p / ((5 + length) / 6)^α.
        normalization: `power` (Hugging Face's) or `gnmt` (Wu et al. 2016, arXiv 1609.08144,
            eq. 14).
        early_stopping: True stops as soon as `num_beams` hypotheses have finished; False also
            requires that the best running one cannot beat the worst of them at its current length;
            `never` requires that it cannot beat it at any length.
        n: number of best hypotheses to return.
    """

    num_beams: Annotated[int, Field(ge=1, le=MAX_COPIES)] = 4
    max_tokens: PositiveCount | None = None
    length_penalty: Annotated[float, Field(ge=-10.0, le=10.0)] = 1.0
    normalization: Literal["power", "gnmt"] = "power"
    early_stopping: bool | Literal["never"] = False
    n: PositiveCount = 1

    @model_validator(mode="after")
    def _fits_together(self) -> "BeamParams":
        if self.n > self.num_beams:
            raise ValueError(
                f"n={self.n} is more than num_beams={self.num_beams}; raise num_beams or lower n"
            )
        return self


class TokenMask(Protocol):
    """The tokens allowed next in one completion; the interface for guided decoding.

    An exception in either method, or a mask of invalid shape or dtype, ends the completion as
    `cancelled`; the traceback is logged.
    """

    def mask(self) -> Tensor | None:
        """Returns a bitmask of the tokens allowed next.

        Returns:
            [⌈V/32⌉] int32: bit t mod 32 of word t / 32 is set if token t is allowed. Missing words
            at the end count as zero. None allows all tokens; if no bit is set, the completion ends.
        """

    def advance(self, token_id: int) -> None:
        """Updates the state with a token that was appended to the completion, including EOS."""


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
    """

    token_id: int
    raw: float
    top_raw: tuple[tuple[int, float], ...]
    processed: float | None = None
    top_processed: tuple[tuple[int, float], ...] | None = None


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
    """

    request_id: int
    token_id: int | None
    text: str
    logprob: float
    finish_reason: FinishReason | None = None
    index: int = 0
    logprobs: Logprobs | None = None
    prompt_logprobs: tuple[Logprobs, ...] | None = None
