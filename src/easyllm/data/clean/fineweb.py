"""FineWeb's own rules (Penedo et al. 2024, arXiv 2406.17557)."""

from collections.abc import Iterator
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from easyllm.core.config import Config
from easyllm.data.clean.text import CLOSING_QUOTES, TERMINAL_PUNCTUATION, TextView, repeated
from easyllm.data.clean.violation import Figure, Fraction, Violation, first_violation, ratio

_LINE_ENDS = TERMINAL_PUNCTUATION | CLOSING_QUOTES


class FineWebQuality(Config):
    """Rejects lists, menus and boilerplate by the shape of their lines.

    Source: arXiv 2406.17557, with the bounds of the code that made the data set; FineWeb-2 has bounds for each language.
    None switches a bound off. Of a text with fewer lines than `min_lines` the shares of lines say nothing (a single line
    without a full stop would be 100% of them) and are not judged.
    """

    kind: Literal["fineweb_quality"] = "fineweb_quality"
    min_punctuated_lines: Fraction | None = 0.12  # lines that end like a sentence or a quotation
    max_short_lines: Fraction | None = 0.67
    short_line_characters: NonNegativeInt = 30  # a line of at most so many is short
    max_duplicate_line_characters: Fraction | None = 0.01
    max_newlines_per_word: float | None = 0.3
    min_lines: PositiveInt = 1

    def figures(self, view: TextView) -> Iterator[Figure]:
        """The measurements with their bounds, each computed when it is asked for."""
        text, lines = view.text, view.lines
        if len(lines) >= self.min_lines:
            punctuated = ratio(sum(line[-1] in _LINE_ENDS for line in lines), len(lines))
            yield Figure("punctuated_lines", punctuated, low=self.min_punctuated_lines)
            short = sum(len(line) <= self.short_line_characters for line in lines)
            yield Figure("short_lines", ratio(short, len(lines)), high=self.max_short_lines)
        newlines = text.count("\n")
        duplicates = ratio(repeated(lines)[1], len(text) - newlines)
        yield Figure(
            "duplicate_line_characters", duplicates, high=self.max_duplicate_line_characters
        )
        if newlines:  # one line needs no words counted
            per_word = ratio(newlines, len(view.words))
            yield Figure("newlines_per_word", per_word, high=self.max_newlines_per_word)

    def apply(self, view: TextView) -> TextView | Violation:
        return first_violation(self.kind, self.figures(view)) or view
