"""Configuration of tokenizer training: types of tokenizer, normalisation and special tokens."""

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator
from tokenizers import Regex

from easyllm.core.config import Config
from easyllm.tokenizer.tokenizer import SpecialTokens

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
    """Text normalisation before pre-tokenization; decoding does not undo it.

    Attributes:
        form: Unicode normalisation form.
        strip_accents: removes combining marks; needs a form that decomposes accented letters (nfd,
            nfkd).
        lowercase: converts the text to lower case.
    """

    form: Literal["nfc", "nfd", "nfkc", "nfkd"] | None = None
    strip_accents: bool = False
    lowercase: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.strip_accents and self.form not in ("nfd", "nfkd"):
            raise ValueError(
                f"strip_accents has no effect with form={self.form}, which does not decompose "
                "accented letters; set form: nfd"
            )
        return self


Digits = Literal["individual", "groups"] | None
"""How numbers are split: into single digits, into groups of up to three from the left, or only by
the pattern (None)."""


class BPEConfig(Config):
    """Byte-level byte pair encoding (BPE).

    Sources: Sennrich et al. 2016 (arXiv 1508.07909); Radford et al. 2019, section 2.2. All 256
    bytes are in the vocabulary, so there is no unknown text. The pre-tokenizer steps apply in the
    order of the attributes.

    Attributes:
        whitespace: split at whitespace and drop it, and separate symbols from words (decoding
            cannot restore the whitespace).
        punctuation: make each punctuation mark a separate word.
        digits: how to split numbers.
        pattern: split with the pattern of gpt2, cl100k or qwen2; None does not split further.
        own_pattern: a regular expression whose matches are the words, used instead of `pattern`.
        add_prefix_space: prepend a space to each word so far that does not start with one.
        min_frequency: pairs that occur less often than this are not merged.
    """

    kind: Literal["bpe"] = "bpe"
    whitespace: bool = False
    punctuation: bool = False
    digits: Digits = None
    pattern: Literal["gpt2", "cl100k", "qwen2"] | None = "gpt2"
    own_pattern: str | None = None
    add_prefix_space: bool = False
    min_frequency: Count = 2

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

    Attributes:
        unk: the UNK token.
        digits: how to split numbers.
        max_word_length: longer words, in characters, become UNK.
        min_frequency: pairs that occur less often than this are not merged.
    """

    kind: Literal["wordpiece"] = "wordpiece"
    unk: str = "[UNK]"
    digits: Digits = None
    max_word_length: Annotated[int, Field(ge=1, le=2**32)] = 100
    min_frequency: Count = 2


class UnigramConfig(Config):
    """SentencePiece's unigram language model (Kudo 2018, arXiv 1804.10959); a space is written ▁.

    Attributes:
        unk: the UNK token.
        byte_fallback: encode a character outside the vocabulary as its bytes (with 256 additional
            pieces) instead of `unk`.
        digits: how to split numbers.
        add_prefix_space: prepend a space to the text.
        max_piece_length: maximum length of a piece, in characters.
    """

    kind: Literal["unigram"] = "unigram"
    unk: str = "<unk>"
    byte_fallback: bool = True
    digits: Digits = None
    add_prefix_space: bool = False
    max_piece_length: Annotated[int, Field(ge=1, le=2**32)] = 16


class WordLevelConfig(Config):
    """One token per word or punctuation mark, in order of frequency; spaces are not preserved.

    Attributes:
        unk: the UNK token.
        digits: how to split numbers.
        min_frequency: words that occur less often than this become `unk`.
    """

    kind: Literal["wordlevel"] = "wordlevel"
    unk: str = "[UNK]"
    digits: Digits = None
    min_frequency: Count = 1


class CharactersConfig(Config):
    """One token per character, including spaces, in order of frequency.

    Attributes:
        unk: the UNK token.
        min_frequency: characters that occur less often than this become `unk`; all others must fit
            in the vocabulary.
    """

    kind: Literal["characters"] = "characters"
    unk: str = "<unk>"
    min_frequency: Count = 1


Kind = Annotated[
    BPEConfig | WordPieceConfig | UnigramConfig | WordLevelConfig | CharactersConfig,
    Field(discriminator="kind"),
]


class TokenizerConfig(Config):
    """Configuration of tokenizer training.

    Attributes:
        model: the type of tokenizer, with its options.
        vocab_size: maximum number of ids, including special tokens; a small corpus may give fewer.
        normalizer: text normalisation.
        special_tokens: these tokens get the first ids, in this order, followed by those of BOS,
            EOS, PAD and UNK that are not among them.
        bos: the BOS token.
        eos: the EOS token.
        pad: the PAD token.
        add_bos: whether encoding prepends BOS.
        add_eos: whether encoding appends EOS.
        chat_template: `chatml` (which adds its two special tokens), or Jinja source.
        max_seq_len: maximum sequence length, written to `tokenizer_config.json`.
    """

    model: Kind = BPEConfig()
    vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCAB_SIZE)] = 32_000
    normalizer: NormalizerConfig = NormalizerConfig()
    special_tokens: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = "<|endoftext|>"
    pad: str | None = None
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None
    max_seq_len: PositiveInt | None = None

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
