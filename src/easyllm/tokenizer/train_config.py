"""Configuration of tokenizer training: types of tokenizer, normalisation and special tokens."""

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator
from tokenizers import Regex

from easyllm.core.config import Config
from easyllm.tokenizer.special_tokens import SpecialTokens

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The ChatML chat template: each turn is enclosed in `<|im_start|>role` and `<|im_end|>`."""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
PATTERNS = {
    "cl100k": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""Pre-tokenizer patterns of GPT-4 and Llama 3 (`cl100k`) and of Qwen 2; the library has GPT-2's
built in."""

MAX_VOCAB_SIZE = 2**22
"""Maximum vocabulary size: four times the largest vocabulary of a published model. The library
allocates memory for all requested pieces in advance and aborts the process if that fails."""
Count = Annotated[int, Field(ge=0, le=2**32)]


class NormalizerConfig(Config):
    """Text normalisation before pre-tokenization; decoding does not undo it."""

    form: Literal["nfc", "nfd", "nfkc", "nfkd"] | None = Field(
        default=None, description="Unicode normalisation form; null applies none."
    )
    strip_accents: bool = Field(
        default=False,
        description="Whether combining marks are removed; needs a form that decomposes accented "
        "letters (nfd, nfkd).",
    )
    lowercase: bool = Field(
        default=False, description="Whether the text is converted to lower case."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.strip_accents and self.form not in ("nfd", "nfkd"):
            raise ValueError(
                f"strip_accents has no effect with form={self.form}, which does not decompose "
                "accented letters; set form: nfd"
            )
        return self


Digits = Literal["individual", "groups"] | None
_DIGITS = (
    "Split numbers into single digits (`individual`) or into groups of up to three from the left "
    "(`groups`); null adds no split."
)


class BPEConfig(Config):
    """Byte-level byte pair encoding (BPE).

    Sources: Sennrich et al. 2016 (arXiv 1508.07909); Radford et al. 2019, section 2.2. All 256
    bytes are in the vocabulary, so there is no unknown text. The pre-tokenizer steps apply in the
    order of the fields.
    """

    kind: Literal["bpe"] = "bpe"
    whitespace: bool = Field(
        default=False,
        description="Whether to split at whitespace and drop it, and separate symbols from words "
        "(decoding cannot restore the whitespace).",
    )
    punctuation: bool = Field(
        default=False, description="Whether each punctuation mark is a separate word."
    )
    digits: Digits = Field(default=None, description=_DIGITS)
    pattern: Literal["gpt2", "cl100k", "qwen2"] | None = Field(
        default="gpt2",
        description="Split with the pattern of GPT-2, of GPT-4 and Llama 3 (`cl100k`) or of Qwen "
        "2; null does not split further.",
    )
    own_pattern: str | None = Field(
        default=None,
        description="Regular expression whose matches are the words, used instead of pattern.",
    )
    add_prefix_space: bool = Field(
        default=False,
        description="Whether a space is prepended to each word so far that does not start with "
        "one.",
    )
    min_frequency: Count = Field(
        default=2, description="Pairs that occur less often than this are not merged."
    )

    @model_validator(mode="after")
    def _pattern_is_sound(self) -> Self:
        if self.own_pattern is None:
            return self
        if "pattern" in self.model_fields_set and self.pattern is not None:
            raise ValueError(f"own_pattern and pattern={self.pattern} are both set; remove one")
        try:
            Regex(self.own_pattern)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"own_pattern is not a valid regular expression ({error})") from None
        return self


class WordPieceConfig(Config):
    """WordPiece, as in BERT (Schuster & Nakajima 2012; Devlin et al. 2019, arXiv 1810.04805).

    Text is split at whitespace and punctuation, and each Chinese character is a separate word. `##`
    marks a piece that continues a word. Spaces are not preserved.
    """

    kind: Literal["wordpiece"] = "wordpiece"
    unk: str = Field(default="[UNK]", description="The UNK token.")
    digits: Digits = Field(default=None, description=_DIGITS)
    max_word_length: int = Field(
        default=100,
        ge=1,
        le=2**32,
        description="Words that are longer than this, in characters, become UNK.",
    )
    min_frequency: Count = Field(
        default=2, description="Pairs that occur less often than this are not merged."
    )


class UnigramConfig(Config):
    """Unigram language model of SentencePiece (Kudo 2018, arXiv 1804.10959); spaces become ▁."""

    kind: Literal["unigram"] = "unigram"
    unk: str = Field(default="<unk>", description="The UNK token.")
    byte_fallback: bool = Field(
        default=True,
        description="Whether a character outside the vocabulary is encoded as its bytes (with 256 "
        "additional pieces) instead of unk.",
    )
    digits: Digits = Field(default=None, description=_DIGITS)
    add_prefix_space: bool = Field(
        default=False, description="Whether a space is prepended to the text."
    )
    max_piece_length: int = Field(
        default=16, ge=1, le=2**32, description="Maximum length of a piece, in characters."
    )


class WordLevelConfig(Config):
    """One token per word or punctuation mark, in order of frequency; spaces are not preserved."""

    kind: Literal["wordlevel"] = "wordlevel"
    unk: str = Field(default="[UNK]", description="The UNK token.")
    digits: Digits = Field(default=None, description=_DIGITS)
    min_frequency: Count = Field(
        default=1, description="Words that occur less often than this become unk."
    )


class CharactersConfig(Config):
    """One token per character, including spaces, in order of frequency."""

    kind: Literal["characters"] = "characters"
    unk: str = Field(default="<unk>", description="The UNK token.")
    min_frequency: Count = Field(
        default=1,
        description="Characters that occur less often than this become unk; all others must fit in "
        "the vocabulary.",
    )


Kind = Annotated[
    BPEConfig | WordPieceConfig | UnigramConfig | WordLevelConfig | CharactersConfig,
    Field(discriminator="kind"),
]


class TokenizerConfig(Config):
    """Configuration of tokenizer training."""

    model: Kind = Field(default=BPEConfig(), description="Type of tokenizer, with its options.")
    vocab_size: int = Field(
        default=32_000,
        ge=1,
        le=MAX_VOCAB_SIZE,
        description="Maximum number of ids, including special tokens; a small corpus may give "
        "fewer.",
    )
    normalizer: NormalizerConfig = Field(
        default=NormalizerConfig(), description="Text normalisation."
    )
    special_tokens: tuple[str, ...] = Field(
        default=(),
        description="These tokens get the first ids, in this order, followed by those of BOS, EOS, "
        "PAD and UNK that are not among them.",
    )
    bos: str | None = Field(default=None, description="The BOS token; null for none.")
    eos: str | None = Field(default="<|endoftext|>", description="The EOS token; null for none.")
    pad: str | None = Field(default=None, description="The PAD token; null for none.")
    add_bos: bool = Field(default=False, description="Whether encoding prepends BOS.")
    add_eos: bool = Field(default=False, description="Whether encoding appends EOS.")
    chat_template: str | None = Field(
        default=None,
        description="`chatml` (which adds its two special tokens), or Jinja source; null for no "
        "template.",
    )
    max_seq_len: PositiveInt | None = Field(
        default=None,
        description="Maximum sequence length, in tokens, written to `tokenizer_config.json`; null "
        "writes none.",
    )

    @field_validator("special_tokens")
    @classmethod
    def _no_token_twice(cls, tokens: tuple[str, ...]) -> tuple[str, ...]:
        twice = [token for token, count in Counter(tokens).items() if count > 1 or not token]
        if twice:
            raise ValueError(f"special token {twice[0]!r} is empty or duplicated; remove it")
        return tokens

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for role in ("bos", "eos"):
            if getattr(self, f"add_{role}") and getattr(self, role) is None:
                raise ValueError(f"add_{role} needs a {role} token; set {role}")
        template = self.chat_template
        if template is not None and template != "chatml" and "{" not in template:
            raise ValueError(f"chat_template={template!r} is neither chatml nor Jinja source")
        return self

    @property
    def special(self) -> SpecialTokens:
        """The BOS, EOS, PAD and UNK tokens."""
        unk = None if isinstance(self.model, BPEConfig) else self.model.unk
        return SpecialTokens(bos=self.bos, eos=self.eos, pad=self.pad, unk=unk)

    @property
    def all_special_tokens(self) -> tuple[str, ...]:
        """All special tokens in the order of their ids, without duplicates."""
        special = self.special
        chat = CHATML_TOKENS if self.chat_template == "chatml" else ()
        roles = (special.bos, special.eos, special.pad, special.unk)
        return tuple(dict.fromkeys([*self.special_tokens, *filter(None, roles), *chat]))
