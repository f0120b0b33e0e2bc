"""Training a tokenizer from text: five kinds, each the `tokenizers` library's own, and each deterministic.

    text → normalizer → pre-tokenizer (words) → model (pieces) → ids

The same corpus gives the same `tokenizer.json` byte for byte, whatever the process and the number of threads. Two of
the library's trainers need help with that: see `_train_word_piece` and `_settle`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from easyllm.core.config import Config
from easyllm.core.errors import ConfigError, DataError
from easyllm.tokenizer.sentencepiece import (
    BYTE_PIECES,
    NEVER,
    SPACE,
    mark_special,
    space_decoder,
    surround,
)
from easyllm.tokenizer.token_bytes import byte_values as byte_values
from easyllm.tokenizer.tokenizer import SpecialTokens, Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Turns between `<|im_start|>role` and `<|im_end|>`."""
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
"""How GPT-4 and Llama 3 (`cl100k`) and Qwen 2 cut text into words; GPT-2's pattern is built into the library."""

MAX_VOCAB_SIZE = 2**22
"""Four times the largest vocabulary of a published model; the library sets memory aside for as many pieces as are asked
for, and ends the process where it gets none."""
Count = Annotated[int, Field(ge=0, le=2**32)]

_SCORE_DIGITS = 4

# ---- configuration


class NormalizerConfig(Config):
    """What is done to text before anything else; what it changes, decoding does not give back.

    `strip_accents` removes combining marks, so it needs a form that takes letters and accents apart (nfd, nfkd).
    """

    form: Literal["nfc", "nfd", "nfkc", "nfkd"] | None = None
    strip_accents: bool = False
    lowercase: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.strip_accents and self.form not in ("nfd", "nfkd"):
            raise ValueError(f"strip_accents with form={self.form} finds no accents; set form: nfd")
        return self


Digits = Literal["individual", "groups"] | None
"""Numbers cut into single digits, into groups of up to three from the left, or left to the pattern."""


class BPEConfig(Config):
    """Byte-level byte pair encoding (Sennrich et al. 2016, arXiv 1508.07909; Radford et al. 2019, section 2.2).

    All 256 bytes are in the vocabulary, so there is no unknown text. The cuts apply in the order they stand here.

    Attributes:
        whitespace: cut at whitespace and drop it, signs apart from words (decoding cannot give it back).
        punctuation: each punctuation mark is a word of its own.
        pattern: gpt2, cl100k or qwen2; None cuts no further.
        own_pattern: a regular expression whose matches are the words, in place of `pattern`.
        add_prefix_space: put a space before each piece so far that does not begin with one.
        min_frequency: pairs rarer than this are not merged.
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
            raise ValueError(f"own_pattern and pattern={self.pattern} are both set; drop one")
        try:
            Regex(self.own_pattern)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"own_pattern is no regular expression ({error})") from None
        return self


class WordPieceConfig(Config):
    """BERT's word pieces (Schuster & Nakajima 2012; Devlin et al. 2019, arXiv 1810.04805): whitespace and punctuation
    cut words, a Chinese character is a word of its own, `##` marks a piece inside a word. Spaces are not kept."""

    kind: Literal["wordpiece"] = "wordpiece"
    unk: str = "[UNK]"
    digits: Digits = None
    max_word_length: Annotated[int, Field(ge=1, le=2**32)] = 100
    min_frequency: Count = 2


class UnigramConfig(Config):
    """Sentencepiece's unigram language model (Kudo 2018, arXiv 1804.10959); a space is written ▁.

    `byte_fallback`: a character outside the vocabulary becomes its bytes (256 more pieces), not `unk`.
    """

    kind: Literal["unigram"] = "unigram"
    unk: str = "<unk>"
    byte_fallback: bool = True
    digits: Digits = None
    add_prefix_space: bool = False
    max_piece_length: Annotated[int, Field(ge=1, le=2**32)] = 16


class WordLevelConfig(Config):
    """A token a word or punctuation mark, the most frequent first. Spaces are not kept."""

    kind: Literal["wordlevel"] = "wordlevel"
    unk: str = "[UNK]"
    digits: Digits = None
    min_frequency: Count = 1


class CharactersConfig(Config):
    """A token a character, spaces too, the most frequent first.

    `min_frequency`: rarer characters become `unk`; all others must fit the vocabulary.
    """

    kind: Literal["characters"] = "characters"
    unk: str = "<unk>"
    min_frequency: Count = 1


Kind = Annotated[
    BPEConfig | WordPieceConfig | UnigramConfig | WordLevelConfig | CharactersConfig,
    Field(discriminator="kind"),
]


class TokenizerConfig(Config):
    """How a tokenizer is trained.

    Attributes:
        model: the kind of tokenizer, with its own options.
        vocab_size: most ids, special tokens included; a small corpus may give fewer.
        special_tokens: take the first ids in this order; bos, eos, pad and unk follow where they are not among them.
        add_bos, add_eos: whether encoding puts bos in front and eos behind.
        chat_template: `chatml` (brings its two tokens along), or jinja source.
        max_seq_len: longest sequence, written to `tokenizer_config.json`.
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
            raise ValueError(f"special token {twice[0]!r} is empty or stands there twice; drop it")
        return tokens

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for role in ("bos", "eos"):
            if getattr(self, f"add_{role}") and getattr(self, role) is None:
                raise ValueError(f"add_{role} needs a {role} token; set {role}")
        template = self.chat_template
        if template is not None and template != "chatml" and "{" not in template:
            raise ValueError(f"chat_template={template!r} is neither chatml nor jinja source")
        return self

    @property
    def special(self) -> SpecialTokens:
        """The tokens with a role."""
        unk = None if isinstance(self.model, BPEConfig) else self.model.unk
        return SpecialTokens(bos=self.bos, eos=self.eos, pad=self.pad, unk=unk)

    @property
    def all_special_tokens(self) -> tuple[str, ...]:
        """Every special token in the order of ids, each once."""
        special = self.special
        chat = CHATML_TOKENS if self.chat_template == "chatml" else ()
        roles = (special.bos, special.eos, special.pad, special.unk)
        return tuple(dict.fromkeys([*self.special_tokens, *filter(None, roles), *chat]))


# ---- training


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `texts` give under `config`.

    Args:
        texts: documents or lines, read once.

    Raises:
        ConfigError: the vocabulary is smaller than the alphabet and the special tokens.
        DataError: the texts hold nothing.

    Example:
        >>> config = TokenizerConfig(vocab_size=300, model=BPEConfig(digits="individual"))
        >>> tokenizer = train_tokenizer(["low lower lowest", "new newer newest"], config)
        >>> tokenizer.decode(tokenizer.encode("newer, 42!"))
        'newer, 42!'
    """
    train = _TRAINERS[type(config.model)]
    backend = train(sound(texts), config.model, config)
    mark_special(backend, config.all_special_tokens)
    special = config.special
    surround(
        backend,
        bos=special.bos if config.add_bos else None,
        eos=special.eos if config.add_eos else None,
    )
    template = CHATML if config.chat_template == "chatml" else config.chat_template
    return Tokenizer(backend, special, chat_template=template, max_seq_len=config.max_seq_len)


def shortfall(tokenizer: Tokenizer, config: TokenizerConfig) -> str | None:
    """A sentence on a vocabulary that came out smaller than was asked for; None where it did not."""
    if tokenizer.vocab_size >= config.vocab_size:
        return None
    return (
        f"the text gives {tokenizer.vocab_size:,} ids, fewer than vocab_size={config.vocab_size:,}: "
        "it holds no more pieces that are frequent enough; give more text, or ask for fewer"
    )


def sound(texts: Iterable[str]) -> Iterator[str]:
    """The texts with lone surrogates replaced, as encoding does.

    Raises:
        DataError: at the end, where all of them were empty.
    """
    empty = True
    for text in texts:
        empty = empty and not text
        yield text.encode("utf-8", "replace").decode("utf-8")
    if empty:
        raise DataError("there is no text to train a tokenizer on; name files that hold some")


def _train_bpe(texts: Iterator[str], model: BPEConfig, config: TokenizerConfig) -> Backend:
    _check_room(config, 256, "bytes")
    backend = Backend(models.BPE())
    _set_steps(backend, _normalizer(config.normalizer), _byte_words(model))
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=model.min_frequency,
        special_tokens=list(config.all_special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _train_word_piece(
    texts: Iterator[str], model: WordPieceConfig, config: TokenizerConfig
) -> Backend:
    """The library numbers the letters inside words in the order of a hash table, which differs between processes, and
    breaks ties between pairs by these numbers. Named as special tokens, they are numbered in our order."""
    chinese = normalizers.BertNormalizer(
        clean_text=False, handle_chinese_chars=True, strip_accents=False, lowercase=False
    )
    backend = Backend(models.WordPiece(unk_token=model.unk))
    _set_steps(
        backend,
        [*_normalizer(config.normalizer), chinese],
        [pre_tokenizers.BertPreTokenizer(), *_digits(model.digits)],
    )
    words = _count_words(backend, texts)
    inside = sorted({f"##{letter}" for word in words for letter in word[1:]})
    alphabet = {letter for word in words for letter in word}
    _check_room(config, len(alphabet) + len(inside), "letters at the start of and inside words")
    special = list(config.all_special_tokens)
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size,
        min_frequency=model.min_frequency,
        special_tokens=[*special, *inside],
        show_progress=False,
    )
    bare = Backend(models.WordPiece(unk_token=model.unk))
    bare.train_from_iterator(chain.from_iterable(map(repeat, words, words.values())), trainer)
    backend.model = models.WordPiece(
        bare.get_vocab(), unk_token=model.unk, max_input_chars_per_word=model.max_word_length
    )
    backend.decoder = decoders.WordPiece()
    return backend


def _train_unigram(texts: Iterator[str], model: UnigramConfig, config: TokenizerConfig) -> Backend:
    byte_pieces = BYTE_PIECES if model.byte_fallback else ()
    _check_room(config, len(byte_pieces) + 1, "byte pieces")
    spaces = pre_tokenizers.Metaspace(
        replacement=SPACE, prepend_scheme="always" if model.add_prefix_space else "never"
    )
    backend = Backend(models.Unigram())
    _set_steps(backend, _normalizer(config.normalizer), [*_digits(model.digits), spaces])
    backend.decoder = space_decoder(strip_prefix=model.add_prefix_space)
    letters = {SPACE, *"".join(byte_pieces)}
    trainer = trainers.UnigramTrainer(
        vocab_size=config.vocab_size - len(byte_pieces),
        special_tokens=list(config.all_special_tokens),
        unk_token=model.unk,
        max_piece_length=model.max_piece_length,
        # text that spells a byte piece must be spelt with these, not read as the byte
        initial_alphabet=sorted(letters),
        show_progress=False,
    )
    try:
        backend.train_from_iterator(_watched(texts, letters), trainer)
    except Exception as error:  # the library raises plain Exception
        if "not large enough" not in str(error):
            raise
        _check_room(config, len(byte_pieces) + len(letters), "byte pieces and different characters")
        raise ConfigError(f"vocab_size={config.vocab_size} is too small; raise it") from None
    num_special = len(config.all_special_tokens)
    pieces = _settle(_read_model(backend)["vocab"][num_special:])
    others = [(piece, NEVER) for piece in (*config.all_special_tokens, *byte_pieces)]
    backend.model = models.Unigram(
        [*others, *pieces],
        unk_id=config.all_special_tokens.index(model.unk),
        byte_fallback=model.byte_fallback,
    )
    return backend


def _train_word_level(
    texts: Iterator[str], model: WordLevelConfig, config: TokenizerConfig
) -> Backend:
    words = [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(), *_digits(model.digits)]
    return _train_whole_words(texts, model, config, words)


def _train_characters(
    texts: Iterator[str], model: CharactersConfig, config: TokenizerConfig
) -> Backend:
    words: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    ]
    counts: Counter[str] = Counter()
    backend = _train_whole_words(_counted(texts, config, counts), model, config, words)
    special = config.all_special_tokens
    alphabet = sum(n >= model.min_frequency and c not in special for c, n in counts.items())
    _check_room(config, alphabet, "different characters", ", or raise model.min_frequency")
    backend.decoder = decoders.Fuse()
    return backend


_TRAINERS: dict[type[Config], Callable[[Iterator[str], Any, TokenizerConfig], Backend]] = {
    BPEConfig: _train_bpe,
    WordPieceConfig: _train_word_piece,
    UnigramConfig: _train_unigram,
    WordLevelConfig: _train_word_level,
    CharactersConfig: _train_characters,
}


def _train_whole_words(
    texts: Iterator[str],
    model: WordLevelConfig | CharactersConfig,
    config: TokenizerConfig,
    words: list[pre_tokenizers.PreTokenizer],
) -> Backend:
    _check_room(config, 1, "word")
    backend = Backend(models.WordLevel(unk_token=model.unk))
    _set_steps(backend, _normalizer(config.normalizer), words)
    trainer = trainers.WordLevelTrainer(
        vocab_size=config.vocab_size,
        min_frequency=model.min_frequency,
        special_tokens=list(config.all_special_tokens),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _normalizer(config: NormalizerConfig) -> list[normalizers.Normalizer]:
    forms = {
        "nfc": normalizers.NFC,
        "nfd": normalizers.NFD,
        "nfkc": normalizers.NFKC,
        "nfkd": normalizers.NFKD,
    }
    steps = [] if config.form is None else [forms[config.form]()]
    steps += [normalizers.StripAccents()] if config.strip_accents else []
    return steps + ([normalizers.Lowercase()] if config.lowercase else [])


def _byte_words(model: BPEConfig) -> list[pre_tokenizers.PreTokenizer]:
    steps: list[pre_tokenizers.PreTokenizer] = []
    steps += [pre_tokenizers.Whitespace()] if model.whitespace else []
    steps += [pre_tokenizers.Punctuation()] if model.punctuation else []
    steps += _digits(model.digits)
    pattern = model.own_pattern or PATTERNS.get(model.pattern or "")
    steps += [pre_tokenizers.Split(Regex(pattern), behavior="isolated")] if pattern else []
    built_in = model.own_pattern is None and model.pattern == "gpt2"
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=model.add_prefix_space, use_regex=built_in)
    return [*steps, to_bytes]


def _digits(digits: Digits) -> list[pre_tokenizers.PreTokenizer]:
    if digits == "individual":
        return [pre_tokenizers.Digits(individual_digits=True)]
    if digits == "groups":
        return [pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), behavior="isolated")]
    return []


def _set_steps(
    backend: Backend,
    normalizer: list[normalizers.Normalizer],
    words: list[pre_tokenizers.PreTokenizer],
) -> None:
    """A single step stands alone, as readers of `tokenizer.json` expect of the well-known kinds."""
    if normalizer:
        alone = len(normalizer) == 1
        backend.normalizer = normalizer[0] if alone else normalizers.Sequence(normalizer)
    backend.pre_tokenizer = words[0] if len(words) == 1 else pre_tokenizers.Sequence(words)


def _check_room(config: TokenizerConfig, needed: int, what: str, other: str = "") -> None:
    """Refuses a vocabulary that `needed` pieces and the special tokens do not fit; `other` is another way out."""
    special = len(config.all_special_tokens)
    if config.vocab_size < needed + special:
        plural = "" if special == 1 else "s"
        raise ConfigError(
            f"vocab_size={config.vocab_size} has no room for {needed} {what} and {special} special token{plural}; "
            f"set it to {needed + special} or more{other}"
        )


def _counted(texts: Iterator[str], config: TokenizerConfig, counts: Counter[str]) -> Iterator[str]:
    """The texts, the characters that normalisation leaves of them counted."""
    normalizer = normalizers.Sequence(_normalizer(config.normalizer))
    for text in texts:
        counts.update(normalizer.normalize_str(text))
        yield text


def _watched(texts: Iterator[str], letters: set[str]) -> Iterator[str]:
    for text in texts:
        letters.update(text)
        yield text


def _count_words(backend: Backend, texts: Iterator[str]) -> Counter[str]:
    words: Counter[str] = Counter()
    for text in texts:
        normal = backend.normalizer.normalize_str(text)
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal))
    return words


def _read_model(backend: Backend) -> dict[str, Any]:
    model: dict[str, Any] = json.loads(backend.to_str())["model"]
    return model


def _settle(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Trained unigram pieces, best first, without what differs between two trainings on the same corpus.

    The library scores the characters that training dropped lowest + 0, 1, 2, ... times 0.0001, in the order of a hash
    table; here they share the lowest score. Other scores are sums of floats in no fixed order, equal to about 1e-10;
    they are rounded well above that.
    """
    lowest = min(score for _, score in pieces)
    characters = {score: piece for piece, score in pieces if len(piece) == 1}
    dropped, penalty = set(), 0.0
    while lowest + penalty in characters:
        dropped.add(characters[lowest + penalty])
        penalty += 0.0001
    settled = [
        (piece, round(lowest if piece in dropped else score, _SCORE_DIGITS))
        for piece, score in pieces
    ]
    return sorted(settled, key=lambda entry: (-entry[1], entry[0]))
