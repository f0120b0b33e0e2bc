"""Sampling and beam search parameters: the options of a request.

This module does not load torch, so that the command line can make its flags from the fields.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from easyllm.core.config import Config

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


class SamplingParams(Config):
    """Sampling parameters: how tokens are chosen and when generation stops.

    Logits are processed in the order of Hugging Face's `generate`: bias, repetition penalty,
    presence and frequency penalties, repeated n-grams, minimum length, mask; then, if tokens are
    sampled: temperature, top-k, top-p, min-p, typical.

    Sources: top-p, Holtzman et al. 2019, arXiv 1904.09751; min-p, arXiv 2407.01082; typical
    sampling, arXiv 2202.00666; repetition penalty, arXiv 1909.05858, section 4.1, with the scope of
    Hugging Face; presence and frequency penalties, OpenAI's definition and scope.
    """

    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = Field(
        1.0, description="Divisor of the logits; 0 selects the most likely token (greedy decoding)."
    )
    top_k: Count = Field(0, description="Sample only from the k most likely tokens; 0 disables it.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0,
        description="Sample only from the smallest set of most likely tokens of total "
        "probability p (nucleus sampling); 1 disables it.",
    )
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.0,
        description="Drop tokens less than p times as likely as the most likely token; 0 "
        "disables it.",
    )
    typical_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0,
        description="Locally typical sampling: keep the tokens whose information content is "
        "closest to the entropy, up to total probability p; 1 disables it.",
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] = Field(
        1.0,
        description="Logits of tokens that occur in prompt or output are divided by it if "
        "positive and multiplied by it if negative; values above 1 make these tokens "
        "less likely.",
    )
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = Field(
        0.0, description="Subtracted from the logits of tokens that occur in the output."
    )
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = Field(
        0.0, description="Subtracted from the logits of a token once per occurrence in the output."
    )
    no_repeat_ngram_size: Count = Field(
        0, description="No n-gram of this size may occur twice in prompt and output; 0 disables it."
    )
    logit_bias: dict[Count, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        {}, max_length=1024, description="Values added to the logits of the given token ids."
    )
    min_tokens: Count = Field(
        0,
        description="Minimum number of tokens before an EOS token or a stop string may end the "
        "completion.",
    )
    seed: int | None = Field(
        None,
        ge=-(2**63),
        lt=2**63,
        description="Seed of the request; the same seed gives the same tokens whatever else is "
        "served. By default a random one.",
    )
    max_tokens: PositiveCount | None = Field(
        None,
        description="Maximum number of tokens to generate; without one, up to the end of the "
        "context.",
    )
    stop: tuple[StopString, ...] = Field(
        (),
        max_length=MAX_STOPS,
        description="Stop strings, which end the generation and are not part of the result; at "
        "most 16, of at most 1,000 characters each.",
    )
    stop_token_ids: tuple[Count, ...] = Field(
        (), description="Token ids that end the generation, in addition to the model's EOS tokens."
    )
    ignore_eos: bool = Field(
        False, description="Continue past the model's EOS tokens, for benchmarks."
    )
    skip_special_tokens: bool = Field(
        True, description="Leave special (control) tokens out of the text."
    )
    include_stop: bool = Field(
        False, description="Let the text end with the stop string that ended it."
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None,
        description="Number of most likely tokens to report at each position, under the raw and "
        "the processed distribution; by default none are reported.",
    )
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None,
        description="The same for the prompt's tokens, under the raw distribution; disables "
        "prefix caching for the request.",
    )
    n: Annotated[int, Field(ge=1, le=MAX_COPIES)] = Field(
        1, description="Number of completions of the prompt."
    )
    best_of: Annotated[int, Field(ge=1, le=MAX_COPIES)] | None = Field(
        None,
        description="Number of completions to generate; the n with the highest mean "
        "log-probability are returned, after all have ended.",
    )

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

    Sources: `power` normalization, Hugging Face's; `gnmt`, Wu et al. 2016, arXiv 1609.08144,
    eq. 14.
    """

    num_beams: Annotated[int, Field(ge=1, le=MAX_COPIES)] = Field(
        4, description="Number of running hypotheses (beam width)."
    )
    max_tokens: PositiveCount | None = Field(
        None,
        description="Maximum length of a hypothesis; without one, up to the end of the context.",
    )
    length_penalty: Annotated[float, Field(ge=-10.0, le=10.0)] = Field(
        1.0,
        description="Exponent α of the length in a hypothesis' score: above 0 favours long ones.",
    )
    normalization: Literal["power", "gnmt"] = Field(
        "power",
        description="Score of a hypothesis: `power` is Σ log p / length^α, `gnmt` is Σ log p / "
        "((5 + length) / 6)^α.",
    )
    early_stopping: bool | Literal["never"] = Field(
        False,
        description="true stops as soon as `num_beams` hypotheses have finished; false also "
        "requires that the best running one cannot beat the worst of them at its "
        "current length; `never` requires that it cannot beat it at any length.",
    )
    n: PositiveCount = Field(1, description="Number of best hypotheses to return.")

    @model_validator(mode="after")
    def _fits_together(self) -> "BeamParams":
        if self.n > self.num_beams:
            raise ValueError(
                f"n={self.n} is more than num_beams={self.num_beams}; raise num_beams or lower n"
            )
        return self
