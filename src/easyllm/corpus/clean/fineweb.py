"""FineWeb's own quality filters (Penedo et al. 2024, arXiv 2406.17557)."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from easyllm.core.config import Config
from easyllm.corpus.clean.text import CLOSING_QUOTES, TERMINAL_PUNCTUATION, TextView, repeated
from easyllm.corpus.clean.violation import Fraction, Metric, Violation, first_violation, ratio

_LINE_ENDS = TERMINAL_PUNCTUATION | CLOSING_QUOTES


class FineWebQuality(Config):
    """Rejects lists, menus and boilerplate by the shape of their lines.

    Source: arXiv 2406.17557, with the thresholds of the code that built the data set; FineWeb-2 has
    thresholds per language. None disables a threshold. For a text with fewer lines than `min_lines`
    the line ratios are not meaningful (a single line without a full stop would be 100% of the
    lines) and are not checked.
    """

    kind: Literal["fineweb_quality"] = "fineweb_quality"
    min_punctuated_lines: Fraction | None = Field(
        0.12,
        description="Minimum share of lines that end in a full stop, `?`, `!` or a quotation mark.",
    )
    max_short_lines: Fraction | None = Field(0.67, description="Maximum share of short lines.")
    short_line_characters: NonNegativeInt = Field(
        30, description="Maximum length of a short line, in characters."
    )
    max_duplicate_line_characters: Fraction | None = Field(
        0.01, description="Maximum share of characters in lines that repeat an earlier one."
    )
    max_newlines_per_word: float | None = Field(
        0.3, description="Maximum number of newlines per word."
    )
    min_lines: PositiveInt = Field(
        1, description="Line ratios are not checked for texts with fewer lines."
    )

    def figures(self, view: TextView) -> Iterator[Metric]:
        """Yields the metrics with their bounds, each computed lazily."""
        text, lines = view.text, view.lines
        if len(lines) >= self.min_lines:
            punctuated = ratio(sum(line[-1] in _LINE_ENDS for line in lines), len(lines))
            yield Metric("punctuated_lines", punctuated, low=self.min_punctuated_lines)
            short = sum(len(line) <= self.short_line_characters for line in lines)
            yield Metric("short_lines", ratio(short, len(lines)), high=self.max_short_lines)
        newlines = text.count("\n")
        duplicates = ratio(repeated(lines)[1], len(text) - newlines)
        yield Metric(
            "duplicate_line_characters", duplicates, high=self.max_duplicate_line_characters
        )
        if newlines:  # a single line always passes: counting its words would be wasted
            per_word = ratio(newlines, len(view.words))
            yield Metric("newlines_per_word", per_word, high=self.max_newlines_per_word)

    def apply(self, view: TextView) -> TextView | Violation:
        """Returns the view unchanged, or the violation that rejects it."""
        return first_violation(self.kind, self.figures(view)) or view
