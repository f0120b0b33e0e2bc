"""Tokenizer evaluation on texts: compression, round-trip losses and unused vocabulary.

bytes per token, characters per token   UTF-8 bytes and code points of the original text
fertility                               tokens per word (Rust et al. 2021, arXiv 2012.15613); a Han
                                        character counts as a word, so for Chinese it is tokens per
                                        character
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice

from easyllm.core.json_types import JsonObject
from easyllm.core.sequences import num_equal
from easyllm.tokenizer.tokenizer import Tokenizer

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Matches a Han character: CJK Unified Ideographs, their extensions and compatibility forms."""
BATCH_TEXTS = 256
EXCERPT = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTripFailure:
    """The first difference between a text and its decoded tokens.

    Attributes:
        at: index of the first differing character.
        text: excerpt of the text from there.
        decoded: excerpt of the decoded text from there.
    """

    at: int
    text: str
    decoded: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFigures:
    """Figures of one tokenizer on one set of texts.

    Attributes:
        num_words: number of words as counted by `count_words`.
        num_unknown: number of UNK tokens, which replace text that the vocabulary cannot represent.
        num_failures: number of texts that decoding does not reproduce; `failure` is the first.
        num_han: number of distinct Han characters in the texts.
        num_han_single: number of those that are encoded as a single token.
    """

    tokenizer: str
    domain: str
    num_texts: int
    num_bytes: int
    num_characters: int
    num_words: int
    num_tokens: int
    num_unknown: int
    num_failures: int
    failure: RoundTripFailure | None
    num_han: int
    num_han_single: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token."""
        return self.num_bytes / max(self.num_tokens, 1)

    @property
    def characters_per_token(self) -> float:
        """Code points per token."""
        return self.num_characters / max(self.num_tokens, 1)

    @property
    def fertility(self) -> float:
        """Tokens per word."""
        return self.num_tokens / max(self.num_words, 1)

    @property
    def han_coverage(self) -> float | None:
        """Fraction of the distinct Han characters that are a single token; None without any."""
        return self.num_han_single / self.num_han if self.num_han else None

    def as_dict(self) -> JsonObject:
        """Returns the counts and the derived ratios."""
        return asdict(self) | {
            "bytes_per_token": self.bytes_per_token,
            "characters_per_token": self.characters_per_token,
            "fertility": self.fertility,
            "han_coverage": self.han_coverage,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyFigures:
    """Figures of one tokenizer's vocabulary.

    Attributes:
        num_unused: number of ids that occur in none of the texts.
        gb2312_coverage: fraction of the 6,763 Han characters of GB 2312 that are a single token.
    """

    tokenizer: str
    vocab_size: int
    num_unused: int
    gb2312_coverage: float


@dataclass(frozen=True, slots=True)
class TokenizerReport:
    """A comparison of tokenizers.

    Attributes:
        texts: one row per set of texts and tokenizer.
        vocabularies: one row per tokenizer.
    """

    texts: tuple[TextFigures, ...]
    vocabularies: tuple[VocabularyFigures, ...]

    def as_dict(self) -> JsonObject:
        """Returns the report as JSON-serialisable values."""
        return {
            "texts": [figures.as_dict() for figures in self.texts],
            "vocabularies": [asdict(figures) for figures in self.vocabularies],
        }


def report(
    tokenizers: Mapping[str, Tokenizer], texts: Mapping[str, Iterable[str]]
) -> TokenizerReport:
    """Evaluates each tokenizer on each set of texts.

    Args:
        tokenizers: tokenizers by name.
        texts: sets of texts by domain or language; each is read once, in batches.

    Example:
        >>> result = report({"mine": tokenizer}, {"en": ["Hello world"]})  # doctest: +SKIP
        >>> result.texts[0].fertility                                      # doctest: +SKIP
        1.0
    """
    seen: dict[str, set[int]] = {name: set() for name in tokenizers}
    rows = []
    for domain, items in texts.items():
        tallies = {name: _Tally(name, domain, t, seen[name]) for name, t in tokenizers.items()}
        for batch in _batches(items):
            for tally in tallies.values():
                tally.add(batch)
        rows += [tally.figures() for tally in tallies.values()]
    vocabularies = tuple(
        VocabularyFigures(
            tokenizer=name,
            vocab_size=tokenizer.vocab_size,
            num_unused=tokenizer.vocab_size - len(seen[name]),
            gb2312_coverage=_num_single(tokenizer, gb2312()) / len(gb2312()),
        )
        for name, tokenizer in tokenizers.items()
    )
    return TokenizerReport(tuple(rows), vocabularies)


def count_words(text: str) -> int:
    """Returns the number of words in a text.

    Each Han character is a word, and so is each run between spaces or Han characters that contains
    a letter or digit.

    >>> count_words("don't use 语言模型 - ok")
    7
    """
    apart, num_han = HAN.subn(" ", text)
    return num_han + sum(any(map(str.isalnum, run)) for run in apart.split())


@cache
def gb2312() -> tuple[str, ...]:
    """Returns the 6,763 Han characters of GB 2312-1980, starting with the 3,755 common ones."""
    rows = (bytes([row, cell]) for row in range(0xB0, 0xF8) for cell in range(0xA1, 0xFF))
    return tuple("".join(code.decode("gb2312", "ignore") for code in rows))


class _Tally:
    """Accumulates the counts of one tokenizer over one set of texts."""

    def __init__(self, name: str, domain: str, tokenizer: Tokenizer, seen: set[int]) -> None:
        self._names, self._tokenizer, self._seen = (name, domain), tokenizer, seen
        self._unknown_id = tokenizer.id_of(tokenizer.special.unk)
        self._texts = self._bytes = self._characters = self._words = 0
        self._tokens = self._unknown = self._failures = 0
        self._failure: RoundTripFailure | None = None
        self._han: set[str] = set()

    def add(self, texts: list[str]) -> None:
        for text, ids in zip(
            texts, self._tokenizer.encode_batch(texts, special_tokens=False), strict=True
        ):
            self._texts += 1
            self._bytes += len(text.encode("utf-8", "replace"))
            self._characters += len(text)
            self._words += count_words(text)
            self._tokens += len(ids)
            self._unknown += 0 if self._unknown_id is None else ids.count(self._unknown_id)
            self._han.update(HAN.findall(text))
            self._seen.update(ids)
            decoded = self._tokenizer.decode(ids, skip_special=False)
            if decoded != text:
                self._failures += 1
                self._failure = self._failure or _first_difference(text, decoded)

    def figures(self) -> TextFigures:
        name, domain = self._names
        return TextFigures(
            tokenizer=name,
            domain=domain,
            num_texts=self._texts,
            num_bytes=self._bytes,
            num_characters=self._characters,
            num_words=self._words,
            num_tokens=self._tokens,
            num_unknown=self._unknown,
            num_failures=self._failures,
            failure=self._failure,
            num_han=len(self._han),
            num_han_single=_num_single(self._tokenizer, sorted(self._han)),
        )


def _num_single(tokenizer: Tokenizer, characters: Iterable[str]) -> int:
    """Returns how many of the characters are encoded as a single token.

    A token for the space that some tokenizers prepend is not counted.
    """
    unknown = tokenizer.id_of(tokenizer.special.unk)
    encoded = tokenizer.encode_batch(list(characters), special_tokens=False)
    blank = {i for ids in encoded for i in ids[:1] if not tokenizer.token_text(i).strip()}
    cores = [ids[1:] if ids[0] in blank else ids for ids in encoded if ids]
    return sum(len(ids) == 1 and ids[0] != unknown for ids in cores)


def _first_difference(text: str, decoded: str) -> RoundTripFailure:
    at = num_equal(text, decoded)
    return RoundTripFailure(at=at, text=text[at : at + EXCERPT], decoded=decoded[at : at + EXCERPT])


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    source = iter(texts)
    while batch := list(islice(source, BATCH_TEXTS)):
        yield batch
