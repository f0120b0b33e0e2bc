"""Training tokenizers from text, deterministically, with the trainers of the `tokenizers` library.

    text → normalizer → pre-tokenizer (words) → model (pieces) → ids

There are five types: BPE, WordPiece, unigram, word-level and character-level. The same corpus
always gives a bitwise identical `tokenizer.json`, independent of the process and the number of
threads. Two of the library's trainers need workarounds: see `_train_word_piece` and
`_canonicalize_scores`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from easyllm.core.config import Config
from easyllm.core.errors import ConfigError, DataError
from easyllm.core.json_types import JsonObject
from easyllm.tokenizer.bos_eos import add_bos_eos
from easyllm.tokenizer.sentencepiece import (
    BYTE_PIECES,
    NEVER_SCORE,
    SPACE,
    mark_special,
    space_decoder,
)
from easyllm.tokenizer.token_bytes import byte_values as byte_values
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.tokenizer.train_config import (
    CHATML,
    PATTERNS,
    BPEConfig,
    CharactersConfig,
    Digits,
    NormalizerConfig,
    TokenizerConfig,
    UnigramConfig,
    WordLevelConfig,
    WordPieceConfig,
)

_SCORE_DIGITS = 4


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Trains a tokenizer on texts.

    Args:
        texts: documents or lines; read once.
        config: the type and the options of the tokenizer.

    Raises:
        ConfigError: the vocabulary is too small for the alphabet and the special tokens.
        DataError: all texts are empty.

    Example:
        >>> config = TokenizerConfig(vocab_size=300, model=BPEConfig(digits="individual"))
        >>> tokenizer = train_tokenizer(["low lower lowest", "new newer newest"], config)
        >>> tokenizer.decode(tokenizer.encode("newer, 42!"))
        'newer, 42!'
    """
    train = _TRAINERS[type(config.model)]
    backend = train(replace_surrogates(texts), config.model, config)
    mark_special(backend, config.all_special_tokens)
    special = config.special
    add_bos_eos(
        backend,
        bos=special.bos if config.add_bos else None,
        eos=special.eos if config.add_eos else None,
    )
    template = CHATML if config.chat_template == "chatml" else config.chat_template
    return Tokenizer(backend, special, chat_template=template, max_seq_len=config.max_seq_len)


def vocab_size_warning(tokenizer: Tokenizer, config: TokenizerConfig) -> str | None:
    """Returns a message if the vocabulary is smaller than requested, otherwise None."""
    if tokenizer.vocab_size >= config.vocab_size:
        return None
    return (
        f"the text yields {tokenizer.vocab_size:,} ids, fewer than "
        f"vocab_size={config.vocab_size:,}: it contains no more pieces that are frequent enough; "
        "give more text, or lower vocab_size"
    )


def replace_surrogates(texts: Iterable[str]) -> Iterator[str]:
    """Yields the texts with lone surrogates replaced, as encoding does.

    Raises:
        DataError: at the end, if all texts were empty.
    """
    empty = True
    for text in texts:
        empty = empty and not text
        yield text.encode("utf-8", "replace").decode("utf-8")
    if empty:
        raise DataError("there is no text to train a tokenizer on; give files that contain text")


def _train_bpe(texts: Iterator[str], model: BPEConfig, config: TokenizerConfig) -> Backend:
    _check_vocab_size(config, 256, "bytes")
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
    """Trains WordPiece deterministically.

    The library numbers the letters inside words in the order of a hash table, which differs between
    processes, and breaks ties between pairs by these numbers. Passing these letters as special
    tokens fixes their order.
    """
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
    _check_vocab_size(
        config, len(alphabet) + len(inside), "letters at the start of and inside words"
    )
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
    _check_vocab_size(config, len(byte_pieces) + 1, "byte pieces")
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
        # text that looks like a byte piece must be encoded with these characters, not as the byte
        initial_alphabet=sorted(letters),
        show_progress=False,
    )
    try:
        backend.train_from_iterator(_watched(texts, letters), trainer)
    except Exception as error:  # the library raises plain Exception
        if "not large enough" not in str(error):
            raise
        _check_vocab_size(
            config, len(byte_pieces) + len(letters), "byte pieces and different characters"
        )
        raise ConfigError(f"vocab_size={config.vocab_size} is too small; raise it") from None
    num_special = len(config.all_special_tokens)
    pieces = _canonicalize_scores(_read_model(backend)["vocab"][num_special:])
    others = [(piece, NEVER_SCORE) for piece in (*config.all_special_tokens, *byte_pieces)]
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
    _check_vocab_size(config, alphabet, "different characters", ", or raise model.min_frequency")
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
    _check_vocab_size(config, 1, "word")
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
    """Sets the normalizer and the pre-tokenizer of a backend.

    A single step is not wrapped in a sequence, because readers of `tokenizer.json` expect the
    well-known tokenizer types in that form.
    """
    if normalizer:
        alone = len(normalizer) == 1
        backend.normalizer = normalizer[0] if alone else normalizers.Sequence(normalizer)
    backend.pre_tokenizer = words[0] if len(words) == 1 else pre_tokenizers.Sequence(words)


def _check_vocab_size(config: TokenizerConfig, needed: int, what: str, other: str = "") -> None:
    """Raises an error if `needed` pieces and the special tokens do not fit in the vocabulary.

    Args:
        config: the training configuration.
        needed: number of pieces that the vocabulary must contain.
        what: description of these pieces, for the message.
        other: alternative remedy, appended to the message.
    """
    special = len(config.all_special_tokens)
    if config.vocab_size < needed + special:
        plural = "" if special == 1 else "s"
        raise ConfigError(
            f"vocab_size={config.vocab_size} is too small for {needed} {what} and {special} "
            f"special token{plural}; set it to {needed + special} or more{other}"
        )


def _counted(texts: Iterator[str], config: TokenizerConfig, counts: Counter[str]) -> Iterator[str]:
    """Yields the texts and counts the characters of their normalised form."""
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


def _read_model(backend: Backend) -> JsonObject:
    model: JsonObject = json.loads(backend.to_str())["model"]
    return model


def _canonicalize_scores(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Returns trained unigram pieces, best first, with reproducible scores.

    Two trainings on the same corpus differ in two ways. The library assigns the characters that
    training dropped the scores lowest + 0, 1, 2, ... times 0.0001, in the order of a hash table;
    here they all get the lowest score. Other scores are sums of floats in no fixed order and agree
    only to about 1e-10; they are rounded much more coarsely than that.
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
