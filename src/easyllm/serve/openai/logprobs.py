"""Log-probabilities of the tokens of a completion, in OpenAI's format."""

from collections.abc import Sequence

from pydantic import BaseModel, Field

from easyllm.serve.content_tokens import ContentToken
from easyllm.tokenizer.token_bytes import shown
from easyllm.tokenizer.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0
"""OpenAI's value for "very unlikely"; JSON cannot represent -inf."""


class TopLogprob(BaseModel):
    """A candidate token at one position of a completion, with its log-probability."""

    token: str = Field(description="Text of the token.")
    bytes: list[int] | None = Field(description="UTF-8 bytes of the token.")
    logprob: float = Field(description="Log-probability of the token in nats.")


class TokenLogprob(TopLogprob):
    """A generated token: its own text and bytes, and its log-probability in nats."""

    top_logprobs: list[TopLogprob] = Field(
        description="The most likely tokens at this position, most likely first."
    )


class TopLogprobDetails(TopLogprob):
    """A candidate token, with `token_details`."""

    removed: bool = Field(
        description="Whether it could not be chosen, because the form of the answer excludes it."
    )


class TokenDetails(TopLogprob):
    """A generated token, with `token_details`."""

    entropy: float | None = Field(
        description="Entropy of the model's distribution at this position in nats."
    )
    removed_mass: float = Field(
        description="Probability of the tokens that the form of the answer excludes."
    )
    top_logprobs: list[TopLogprobDetails] = Field(
        description="The most likely tokens at this position, most likely first."
    )


class ChoiceLogprobs(BaseModel):
    """Log-probabilities of the tokens in a completion's content."""

    content: list[TokenDetails | TokenLogprob] = Field(
        description="Log-probabilities of each token."
    )
    refusal: None = Field(None, description="Always null.")


def choice_logprobs(
    tokens: Sequence[ContentToken], tokenizer: Tokenizer, *, details: bool = False
) -> ChoiceLogprobs:
    """Returns the tokens' raw log-probabilities (nats), each with the most likely alternatives.

    Args:
        tokens: the tokens.
        tokenizer: the tokenizer of the model.
        details: whether entropies are included, and what the form of the answer has excluded.
    """

    def entry(own: bytes | None, logprob: float) -> TopLogprob:
        return TopLogprob(
            token=shown(own or b""),
            bytes=None if own is None else list(own),
            logprob=max(logprob, MIN_LOGPROB),
        )

    def other(token_id: int, logprob: float, begins: bool) -> TopLogprob:
        own = tokenizer.token_bytes(token_id)
        return entry(own.removeprefix(b" ") if begins and own is not None else own, logprob)

    def plain(token: ContentToken) -> TokenLogprob:
        return TokenLogprob(
            **entry(token.own, token.place.raw).model_dump(),
            top_logprobs=[other(*pair, token.begins) for pair in token.place.top_raw],
        )

    def detailed(token: ContentToken) -> TokenDetails:
        place = token.place
        return TokenDetails(
            **entry(token.own, place.raw).model_dump(),
            entropy=place.entropy,
            removed_mass=place.removed_mass,
            top_logprobs=[
                TopLogprobDetails(
                    **other(token_id, value, token.begins).model_dump(),
                    removed=token_id in place.removed,
                )
                for token_id, value in place.top_raw
            ],
        )

    return ChoiceLogprobs(content=[(detailed if details else plain)(token) for token in tokens])
