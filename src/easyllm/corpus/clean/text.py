"""A text with its lines, paragraphs and words, computed lazily and shared by all rules."""

import copy
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from easyllm.corpus.clean.scripts import UNSPACED, UNSPACED_CHARACTER

if TYPE_CHECKING:
    from easyllm.corpus.clean.ngrams import NgramStatistics

TERMINAL_PUNCTUATION = frozenset(".!?‼‽⁇⁈⁉。！？．｡։؟۔।॥።")
"""Punctuation marks that end a sentence."""
CLOSING_QUOTES = frozenset("\"'”’»」』")

# Combining marks are not \w in `re`, but are part of words in Hebrew, Arabic, Indic scripts, Thai
_MARKS = (
    "\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u05c1-\u05c7\u0610-\u061a\u064b-\u065f\u0670"
    "\u06d6-\u06dc\u06df-\u06e8\u0900-\u0903\u093a-\u094f\u0955-\u0957\u0962\u0963\u0981-\u0983"
    "\u09bc-\u09d7\u0a01-\u0a03\u0a3c-\u0a51\u0a70-\u0a83\u0abc-\u0acd\u0b01-\u0b03\u0b3c-\u0b57"
    "\u0b82\u0bbe-\u0bcd\u0c00-\u0c04\u0c3e-\u0c56\u0c81-\u0c83\u0cbc-\u0cd6\u0d00-\u0d03"
    "\u0d3b-\u0d4d\u0dca-\u0ddf\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"
)
WORD = re.compile(rf"[\w{_MARKS}]+(?:['’.,][\w{_MARKS}]+)*|\.{{2,}}|[^\w\s]")
WORD_OR_CHARACTER = re.compile(
    rf"[{UNSPACED}]|[^\W{UNSPACED}]+(?:['’.,][^\W{UNSPACED}]+)*|\.{{2,}}|[^\w\s]"
)
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


@dataclass(frozen=True, slots=True)
class WordCounts:
    """Word counts of a text, by type of word.

    Attributes:
        total: all words, including punctuation marks.
        symbols: words without a letter or digit.
        alphabetic: words with at least one letter.
        characters: number of characters in the words that are not symbols.
    """

    total: int
    symbols: int
    alphabetic: int
    characters: int


class TextView:
    """A text with the properties that the rules measure.

    A line is stripped and never blank. A word is a run of letters and digits (`don't`, `3.5` and
    `example.com` are one word each), a punctuation mark, or one character of a script written
    without spaces. Punctuation marks count because the published thresholds were set with
    tokenizers that split them off.

    Args:
        text: the text.
        language: its language code; None if unknown.

    >>> TextView("It costs $3.50, 不贵。").words
    ['It', 'costs', '$', '3.50', ',', '不', '贵', '。']
    """

    def __init__(self, text: str, language: str | None = None) -> None:
        self.text = text
        self.language = language

    def with_text(self, text: str) -> "TextView":
        """Returns a view of another text in the same language; itself if the text is equal."""
        return self if text == self.text else TextView(text, self.language)

    def with_language(self, language: str) -> "TextView":
        """Returns a view of the same text, with all cached properties, and the given language."""
        view = copy.copy(self)
        view.language = language
        return view

    @cached_property
    def lines(self) -> list[str]:
        """The non-blank lines, stripped."""
        return [line for raw in self.text.split("\n") if (line := raw.strip())]

    @cached_property
    def paragraphs(self) -> list[str]:
        """The blocks separated by blank lines, stripped."""
        text = self.text.strip()
        return [block.strip() for block in _PARAGRAPH_BREAK.split(text)] if text else []

    @cached_property
    def words(self) -> list[str]:
        """The words, including punctuation marks."""
        has_unspaced = not self.text.isascii() and UNSPACED_CHARACTER.search(self.text)
        return (WORD_OR_CHARACTER if has_unspaced else WORD).findall(self.text)

    @cached_property
    def word_counts(self) -> WordCounts:
        """The counts of words by type."""
        words = self.words
        # Most words are letters only, which str.isalpha detects in C; only the rest needs a loop
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
        """The repetition statistics of the words."""
        # Imported here so that reading a recipe does not import numpy
        from easyllm.corpus.clean.ngrams import NgramStatistics

        return NgramStatistics(self.words)

    @property
    def num_words(self) -> int:
        """The number of words that are not punctuation marks."""
        return self.word_counts.total - self.word_counts.symbols


def repeated(pieces: list[str]) -> tuple[int, int]:
    """Returns how many of `pieces` repeat an earlier one, and how many characters these contain.

    >>> repeated(["one", "two", "one", "one"])
    (2, 6)
    """
    distinct = set(pieces)
    if len(distinct) == len(pieces):
        return 0, 0
    return len(pieces) - len(distinct), sum(map(len, pieces)) - sum(map(len, distinct))
