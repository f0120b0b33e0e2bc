"""Gopher's quality and repetition filters.

Source: Rae et al. 2021, arXiv 2112.11446, appendix A.1 and table A1.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from easyllm.core.config import Config
from easyllm.corpus.clean.text import TextView, repeated
from easyllm.corpus.clean.violation import (
    Fraction,
    Metric,
    Violation,
    check_order,
    first_violation,
    ratio,
)

ENGLISH_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
ELLIPSES = ("...", "…")
BULLETS = ("•", "-")

NgramLimits = dict[Annotated[int, Field(ge=1)], Fraction]
"""n-gram order -> maximum share of the text's characters."""
TOP_NGRAM_LIMITS: NgramLimits = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_NGRAM_LIMITS: NgramLimits = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


class GopherQuality(Config):
    """Rejects texts whose words, symbols or lines are not typical of prose.

    Source: arXiv 2112.11446, appendix A.1. The word count and the mean word length exclude
    punctuation marks; the ratios are relative to all words including punctuation marks, as in
    FineWeb's implementation. None disables a threshold.
    """

    kind: Literal["gopher_quality"] = "gopher_quality"
    min_words: int | None = Field(
        50, description="Minimum number of words, without punctuation marks."
    )
    max_words: int | None = Field(
        100_000, description="Maximum number of words, without punctuation marks."
    )
    min_mean_word_length: float | None = Field(
        3, description="Minimum mean word length in characters."
    )
    max_mean_word_length: float | None = Field(
        10, description="Maximum mean word length in characters."
    )
    max_hash_ratio: float | None = Field(0.1, description="Maximum number of `#` per word.")
    max_ellipsis_ratio: float | None = Field(
        0.1, description="Maximum number of `...` and `…` per word."
    )
    max_bullet_lines: Fraction | None = Field(
        0.9, description="Maximum share of lines that start with a bullet."
    )
    max_ellipsis_lines: Fraction | None = Field(
        0.3, description="Maximum share of lines that end with an ellipsis."
    )
    min_alphabetic_words: Fraction | None = Field(
        0.8, description="Minimum share of words with a letter."
    )
    min_stop_words: int | None = Field(2, description="Minimum number of distinct stop words.")
    stop_words: tuple[str, ...] = Field(
        ENGLISH_STOP_WORDS, description="The stop words that are counted."
    )
    min_lines: PositiveInt = Field(
        1, description="Line ratios are not checked for texts with fewer lines."
    )

    @model_validator(mode="after")
    def _check(self) -> "GopherQuality":
        check_order("words", self.min_words, self.max_words)
        check_order("mean_word_length", self.min_mean_word_length, self.max_mean_word_length)
        return self

    def figures(self, view: TextView) -> Iterator[Metric]:
        """Yields the metrics with their bounds, each computed lazily."""
        counts, text, lines = view.word_counts, view.text, view.lines
        words = view.num_words
        length = ratio(counts.characters, words)
        yield Metric("words", words, self.min_words, self.max_words)
        yield Metric(
            "mean_word_length", length, self.min_mean_word_length, self.max_mean_word_length
        )
        hashes = ratio(text.count("#"), counts.total)
        yield Metric("hash_ratio", hashes, high=self.max_hash_ratio)
        ellipses = ratio(sum(map(text.count, ELLIPSES)), counts.total)
        yield Metric("ellipsis_ratio", ellipses, high=self.max_ellipsis_ratio)
        if len(lines) >= self.min_lines:
            bullets = ratio(sum(line.startswith(BULLETS) for line in lines), len(lines))
            yield Metric("bullet_lines", bullets, high=self.max_bullet_lines)
            cut_off = ratio(sum(line.endswith(ELLIPSES) for line in lines), len(lines))
            yield Metric("ellipsis_lines", cut_off, high=self.max_ellipsis_lines)
        alphabetic = ratio(counts.alphabetic, counts.total)
        yield Metric("alphabetic_words", alphabetic, low=self.min_alphabetic_words)
        stop_words = len(set(self.stop_words).intersection(view.words))
        yield Metric("stop_words", stop_words, low=self.min_stop_words)

    def apply(self, view: TextView) -> TextView | Violation:
        """Returns the view unchanged, or the violation that rejects it."""
        return first_violation(self.kind, self.figures(view)) or view


class GopherRepetition(Config):
    """Rejects texts that repeat lines, paragraphs or n-grams of words.

    Source: arXiv 2112.11446, table A1. Character shares are relative to the full text. The n-gram
    metrics follow FineWeb's implementation; see `NgramStatistics` for how they are counted. None,
    or omitting an order, disables a threshold.
    """

    kind: Literal["gopher_repetition"] = "gopher_repetition"
    max_duplicate_paragraphs: Fraction | None = Field(
        0.30, description="Maximum share of paragraphs that repeat an earlier one."
    )
    max_duplicate_paragraph_characters: Fraction | None = Field(
        0.20, description="Maximum share of characters in such paragraphs."
    )
    max_duplicate_lines: Fraction | None = Field(
        0.30, description="Maximum share of lines that repeat an earlier one."
    )
    max_duplicate_line_characters: Fraction | None = Field(
        0.20, description="Maximum share of characters in such lines."
    )
    max_top_ngram_characters: NgramLimits = Field(
        TOP_NGRAM_LIMITS,
        description="Maximum share of characters in the most frequent n-gram, by order n.",
    )
    max_duplicate_ngram_characters: NgramLimits = Field(
        DUPLICATE_NGRAM_LIMITS,
        description="Maximum share of characters in n-grams that repeat, by order n.",
    )
    min_ngram_text: NonNegativeInt = Field(
        0,
        description="Minimum denominator of the n-gram shares, in characters: in a text of one "
        "or two sentences, a name that occurs twice is already a large share of the "
        "text.",
    )

    def figures(self, view: TextView) -> Iterator[Metric]:
        """Yields the metrics with their bounds, each computed lazily."""
        size = len(view.text)
        count, characters = repeated(view.paragraphs)
        duplicates = ratio(count, len(view.paragraphs))
        yield Metric("duplicate_paragraphs", duplicates, high=self.max_duplicate_paragraphs)
        yield Metric(
            "duplicate_paragraph_characters",
            ratio(characters, size),
            high=self.max_duplicate_paragraph_characters,
        )
        count, characters = repeated(view.lines)
        duplicates = ratio(count, len(view.lines))
        yield Metric("duplicate_lines", duplicates, high=self.max_duplicate_lines)
        yield Metric(
            "duplicate_line_characters",
            ratio(characters, size),
            high=self.max_duplicate_line_characters,
        )
        size = max(size, self.min_ngram_text)
        for order, limit in sorted(self.max_top_ngram_characters.items()):
            top = ratio(view.ngrams.top_characters(order), size)
            yield Metric(f"top_{order}_gram_characters", top, high=limit)
        for order, limit in sorted(self.max_duplicate_ngram_characters.items()):
            duplicates = ratio(view.ngrams.duplicate_characters(order), size)
            yield Metric(f"duplicate_{order}_gram_characters", duplicates, high=limit)

    def apply(self, view: TextView) -> TextView | Violation:
        """Returns the view unchanged, or the violation that rejects it."""
        return first_violation(self.kind, self.figures(view)) or view
