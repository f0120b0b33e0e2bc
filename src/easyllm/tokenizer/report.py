"""How well tokenizers fit texts: length of the sequences, what is lost, what is never used.

bytes per token, characters per token     UTF-8 bytes and code points of the text as it came
fertility                                 tokens per word (Rust et al. 2021, arXiv 2012.15613); a Han character is
                                          a word, so for Chinese it is tokens per character
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from typing import Any

from easyllm.tokenizer.tokenizer import Tokenizer

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""A Han character: the CJK Unified Ideographs, their extensions and compatibility forms."""
BATCH_TEXTS = 256
EXCERPT = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTripFailure:
    """Where decoding first departs from the text, and what stands in either from there."""

    at: int
    text: str
    decoded: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFigures:
    """One tokenizer on one set of texts.

    Attributes:
        num_words: runs between spaces that hold a letter or digit, and Han characters one by one.
        num_unknown: tokens that stand for text the vocabulary cannot express.
        num_failures: texts that decoding does not give back; `failure` is the first.
        num_han, num_han_single: different Han characters in the texts, and those that are a single token.
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
        return self.num_bytes / max(self.num_tokens, 1)

    @property
    def characters_per_token(self) -> float:
        return self.num_characters / max(self.num_tokens, 1)

    @property
    def fertility(self) -> float:
        """Tokens per word."""
        return self.num_tokens / max(self.num_words, 1)

    @property
    def han_coverage(self) -> float | None:
        """Share of the different Han characters in the texts that are a single token; None where there are none."""
        return self.num_han_single / self.num_han if self.num_han else None

    def as_dict(self) -> dict[str, Any]:
        """The counts and what follows from them."""
        return asdict(self) | {
            "bytes_per_token": self.bytes_per_token,
            "characters_per_token": self.characters_per_token,
            "fertility": self.fertility,
            "han_coverage": self.han_coverage,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyFigures:
    """One tokenizer's vocabulary.

    Attributes:
        num_unused: ids that occur in none of the texts.
        gb2312_coverage: share of the 6,763 Han characters of GB 2312 that are a single token.
    """

    tokenizer: str
    vocab_size: int
    num_unused: int
    gb2312_coverage: float


@dataclass(frozen=True, slots=True)
class TokenizerReport:
    """Tokenizers side by side: a row for each of them on each set of texts, and one for each vocabulary."""

    texts: tuple[TextFigures, ...]
    vocabularies: tuple[VocabularyFigures, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {
            "texts": [figures.as_dict() for figures in self.texts],
            "vocabularies": [asdict(figures) for figures in self.vocabularies],
        }


def report(
    tokenizers: Mapping[str, Tokenizer], texts: Mapping[str, Iterable[str]]
) -> TokenizerReport:
    """What each tokenizer makes of each set of texts.

    Args:
        tokenizers: by name.
        texts: by domain or language; each is read once, a batch at a time.

    Example:
        >>> report({"mine": tokenizer}, {"en": ["Hello world"]}).texts[0].fertility  # doctest: +SKIP
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
    """Words of a text: its Han characters, and the runs between spaces and them that hold a letter or digit.

    >>> count_words("don't use 语言模型 - ok")
    7
    """
    apart, num_han = HAN.subn(" ", text)
    return num_han + sum(any(map(str.isalnum, run)) for run in apart.split())


@cache
def gb2312() -> tuple[str, ...]:
    """The 6,763 Han characters of GB 2312-1980, the common 3,755 first."""
    rows = (bytes([row, cell]) for row in range(0xB0, 0xF8) for cell in range(0xA1, 0xFF))
    return tuple("".join(code.decode("gb2312", "ignore") for code in rows))


class _Tally:
    """Sums of one tokenizer over one set of texts."""

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
    """How many of the characters are one token, a token for the space that some kinds put in front not counted."""
    unknown = tokenizer.id_of(tokenizer.special.unk)
    encoded = tokenizer.encode_batch(list(characters), special_tokens=False)
    blank = {i for ids in encoded for i in ids[:1] if not tokenizer.token_text(i).strip()}
    cores = [ids[1:] if ids[0] in blank else ids for ids in encoded if ids]
    return sum(len(ids) == 1 and ids[0] != unknown for ids in cores)


def _first_difference(text: str, decoded: str) -> RoundTripFailure:
    pairs = enumerate(zip(text, decoded, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(decoded)))
    return RoundTripFailure(at=at, text=text[at : at + EXCERPT], decoded=decoded[at : at + EXCERPT])


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    source = iter(texts)
    while batch := list(islice(source, BATCH_TEXTS)):
        yield batch
