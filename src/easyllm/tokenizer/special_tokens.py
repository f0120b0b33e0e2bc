"""The special tokens of a model, by their purpose."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """The texts of a model's BOS, EOS, PAD and UNK tokens; None for a token it does not have."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
