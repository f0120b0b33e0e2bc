"""What a caller asks for and what comes back."""

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
"""Largest whole number a request may hold, its seed apart: what lies beyond 64 bits would fail a whole batch's tensors."""
MAX_STOPS = 16
MAX_STOP_CHARS = 1000
"""Longest stop string: so much text may be held back for each completion."""
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveCount = Annotated[int, Field(ge=1, le=MAX_COUNT)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_numbers = itertools.count()


class SamplingParams(Config):
    """How tokens are chosen. What changes the logits is applied in the order of Hugging Face's `generate`: bias, repetition,
    presence and frequency, n-grams, least length, mask; and where tokens are drawn: temperature, top-k, top-p, min-p, typical.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token (greedy).
        top_k: only the k most likely tokens (0: all).
        top_p: only the smallest set of tokens whose probability reaches p (Holtzman et al. 2019, arXiv 1904.09751).
        min_p: only tokens at least so likely as this share of the most likely one (arXiv 2407.01082).
        typical_p: only the tokens whose information is closest to the entropy, until they reach p (arXiv 2202.00666).
        repetition_penalty: logits of tokens of the prompt and the output are divided by it where positive and
            multiplied where negative (arXiv 1909.05858, section 4.1; the scope is Hugging Face's).
        presence_penalty, frequency_penalty: subtracted from the logits of tokens of the output: once, and as often
            as they occur (the definition, and the scope, are OpenAI's).
        no_repeat_ngram_size: no n tokens occur twice in prompt and output (0: any may).
        logit_bias: added to the logits of these ids.
        min_tokens: no end token, and no stop string, before so many.
        seed: of this request alone; the same seed gives the same tokens whatever else is served.
        max_tokens: most tokens to generate; None goes on to the end of the context.
        stop: texts that end the generation; they are not part of the result. At most 16, of at most 1,000 characters.
        stop_token_ids: ids that end it, besides the model's own.
        ignore_eos: goes on past the model's end tokens (for measurements).
        logprobs: this many most likely tokens are reported for each token, raw and processed (None: none).
        prompt_logprobs: the same for the prompt's tokens, raw; nothing is taken from the prefix cache then.
        n: completions of the same prompt.
        best_of: completions generated, of which the `n` with the highest mean log-probability are given (all at the
            end: which they are is not known before).
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
        """Completions to generate."""
        return self.best_of or self.n


class BeamParams(Config):
    """Beam search.

    Attributes:
        num_beams: hypotheses kept.
        max_tokens: of the longest; None goes on to the end of the context.
        length_penalty: α of the score Σ log p / length^α, or with `gnmt` of Σ log p / ((5 + length) / 6)^α.
        normalization: `power` (Hugging Face's) or `gnmt` (Wu et al. 2016, arXiv 1609.08144, eq. 14).
        early_stopping: True ends with `num_beams` finished hypotheses; False where the best running one could not
            become better at its present length; `never` where it could not at any length.
        n: how many of the best are returned.
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
    """Which tokens may come next in one completion; guided decoding is an implementation of this.

    An error of either method, or a mask of another form, ends the completion as `cancelled`; the log has the traceback.
    """

    def mask(self) -> Tensor | None:
        """[⌈V/32⌉] int32: bit t mod 32 of word t / 32 is set where token t may come next. None where any may; with no bit
        set the completion ends. Words that are missing at the end count as zero."""

    def advance(self, token_id: int) -> None:
        """Takes note of a token that the completion has taken, its end token included."""


class MaskSource(Protocol):
    """Makes the masks of a request: one for each completion, as each has a state of its own."""

    def start(self) -> TokenMask:
        """The mask of a completion that has no token yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt, as ids, with its sampling; `id` is unique in this process.

    Attributes:
        adapter: the name of the adapter to use; empty for the base alone, or for a model's adapter of every row.
        salt: prefixes in the cache are shared among requests of the same adapter and salt only.
        mask: bars tokens step by step.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    adapter: str = ""
    salt: str = ""
    mask: MaskSource | None = None
    id: int = field(default_factory=lambda: next(_numbers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """Log-probabilities in nats at one place of a text.

    Attributes:
        token_id: the token that stands there.
        raw: of that token under the model's own distribution.
        top_raw: (id, log-probability) of the most likely tokens under it, the most likely first.
        processed, top_processed: the same under the distribution the token was chosen from (penalties, bias, mask,
            temperature, top-k ...); None for tokens of a prompt.
    """

    token_id: int
    raw: float
    top_raw: tuple[tuple[int, float], ...]
    processed: float | None = None
    top_processed: tuple[tuple[int, float], ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """What a step gave one completion of a request.

    Attributes:
        token_id: the new token; None when only held-back text or the end is reported.
        text: the new text that is sure by now; may be empty.
        logprob: log-probability of the token in nats under the unmodified (raw) distribution.
        finish_reason: set on the last event of a completion.
        index: which of the request's completions this is.
        logprobs: where they were asked for.
        prompt_logprobs: on a completion's first event where they were asked for: of each prompt token after the first.
    """

    request_id: int
    token_id: int | None
    text: str
    logprob: float
    finish_reason: FinishReason | None = None
    index: int = 0
    logprobs: Logprobs | None = None
    prompt_logprobs: tuple[Logprobs, ...] | None = None
