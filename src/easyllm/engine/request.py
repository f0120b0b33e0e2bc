"""What a caller asks for and what comes back."""

import itertools
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from easyllm.core.config import Config

FinishReason = Literal["stop", "length", "cancelled"]
_numbers = itertools.count()


class SamplingParams(Config):
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token (greedy).
        top_k: only the k most likely tokens (0: all).
        top_p: only the smallest set of tokens whose probability reaches p (Holtzman et al. 2019, arXiv 1904.09751).
        seed: of this request alone; the same seed gives the same tokens whatever else is served.
        max_tokens: most tokens to generate; None goes on to the end of the context.
        stop: texts that end the generation; they are not part of the result.
        stop_token_ids: ids that end it, besides the model's own.
        ignore_eos: goes on past the model's end tokens (for measurements).
    """

    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    max_tokens: PositiveInt | None = None
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), max_length=16)
    stop_token_ids: tuple[NonNegativeInt, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt, as ids, with its sampling; `id` is unique in this process."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    id: int = field(default_factory=lambda: next(_numbers))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """What a step gave one request.

    Attributes:
        token_id: the new token; None when only held-back text or the end is reported.
        text: the new text that is sure by now; may be empty.
        logprob: log-probability of the token in nats under the unmodified distribution.
        finish_reason: set on the last event of a request.
    """

    request_id: int
    token_id: int | None
    text: str
    logprob: float
    finish_reason: FinishReason | None = None
