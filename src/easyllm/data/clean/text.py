"""A text with its lines, paragraphs and words, each computed when first asked for and shared by all rules."""

import copy
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from easyllm.data.clean.ngrams import NgramStatistics

HAN = "々〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Han characters, as the inside of a regular expression's character class."""
TERMINAL_PUNCTUATION = frozenset(".!?‼‽⁇⁈⁉。！？．｡։؟۔।॥።")
"""Marks that end a sentence."""
CLOSING_QUOTES = frozenset("\"'”’»」』")

_UNSPACED = HAN + "\u3040-\u30ff"  # kana too is written without spaces
# Combining marks are not \w in `re`, yet parts of words in Hebrew, Arabic, the scripts of India, Thai.
_MARKS = (
    "\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u05c1-\u05c7\u0610-\u061a\u064b-\u065f\u0670"
    "\u06d6-\u06dc\u06df-\u06e8\u0900-\u0903\u093a-\u094f\u0955-\u0957\u0962\u0963\u0981-\u0983"
    "\u09bc-\u09d7\u0a01-\u0a03\u0a3c-\u0a51\u0a70-\u0a83\u0abc-\u0acd\u0b01-\u0b03\u0b3c-\u0b57"
    "\u0b82\u0bbe-\u0bcd\u0c00-\u0c04\u0c3e-\u0c56\u0c81-\u0c83\u0cbc-\u0cd6\u0d00-\u0d03"
    "\u0d3b-\u0d4d\u0dca-\u0ddf\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"
)
_IS_UNSPACED = re.compile(f"[{_UNSPACED}]")
WORD = re.compile(rf"[\w{_MARKS}]+(?:['’.,][\w{_MARKS}]+)*|\.{{2,}}|[^\w\s]")
WORD_OR_CHARACTER = re.compile(
    rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:['’.,][^\W{_UNSPACED}]+)*|\.{{2,}}|[^\w\s]"
)
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


@dataclass(frozen=True, slots=True)
class WordCounts:
    """How many words a text has, by what they are made of.

    Attributes:
        total: all words, punctuation marks included.
        symbols: words without a letter or digit.
        alphabetic: words with at least one letter.
        characters: characters in the words that are no symbols.
    """

    total: int
    symbols: int
    alphabetic: int
    characters: int


class TextView:
    """A text and what the rules measure of it.

    A line is stripped and never blank. A word is a run of letters and digits (`don't`, `3.5` and `example.com` are one
    each), a punctuation mark, or, in the scripts written without spaces, one character. Marks count because the
    published thresholds were set with tokenizers that split them off.

    >>> TextView("It costs $3.50, 不贵。").words
    ['It', 'costs', '$', '3.50', ',', '不', '贵', '。']
    """

    def __init__(self, text: str, language: str | None = None) -> None:
        self.text = text
        self.language = language

    def with_text(self, text: str) -> "TextView":
        """A view of another text in the same language; the same view if the text is the same."""
        return self if text == self.text else TextView(text, self.language)

    def with_language(self, language: str) -> "TextView":
        """The same text, and all that was computed of it, with its language known."""
        view = copy.copy(self)
        view.language = language
        return view

    @cached_property
    def lines(self) -> list[str]:
        return [line for raw in self.text.split("\n") if (line := raw.strip())]

    @cached_property
    def paragraphs(self) -> list[str]:
        """Blocks between blank lines."""
        text = self.text.strip()
        return [block.strip() for block in _PARAGRAPH_BREAK.split(text)] if text else []

    @cached_property
    def words(self) -> list[str]:
        has_unspaced = not self.text.isascii() and _IS_UNSPACED.search(self.text)
        return (WORD_OR_CHARACTER if has_unspaced else WORD).findall(self.text)

    @cached_property
    def word_counts(self) -> WordCounts:
        words = self.words
        # most words are letters only, which str.isalpha tells in C; the rest are looked at one by one
        rest = [word for word in words if not word.isalpha()]
        symbols = [word for word in rest if not any(map(str.isalnum, word))]
        mixed = sum(len(word) > 1 and any(map(str.isalpha, word)) for word in rest)
        return WordCounts(
            total=len(words),
            symbols=len(symbols),
            alphabetic=len(words) - len(rest) + mixed,
            characters=sum(map(len, words)) - sum(map(len, symbols)),
        )

    @cached_property
    def ngrams(self) -> "NgramStatistics":
        from easyllm.data.clean.ngrams import NgramStatistics  # reading a recipe needs no numpy

        return NgramStatistics(self.words)

    @property
    def num_words(self) -> int:
        """Words that are no punctuation marks."""
        return self.word_counts.total - self.word_counts.symbols


def is_unspaced(word: str) -> bool:
    """Whether a word is of a script that is written without spaces.

    >>> is_unspaced("茶"), is_unspaced("tea")
    (True, False)
    """
    return _IS_UNSPACED.match(word) is not None


def repeated(pieces: list[str]) -> tuple[int, int]:
    """How many of `pieces` were there before, and how many characters they hold.

    >>> repeated(["one", "two", "one", "one"])
    (2, 6)
    """
    distinct = set(pieces)
    if len(distinct) == len(pieces):
        return 0, 0
    return len(pieces) - len(distinct), sum(map(len, pieces)) - sum(map(len, distinct))
