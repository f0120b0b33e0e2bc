"""C4 quality filter: keeps lines that are sentences and rejects pages that are not prose.

Source: Raffel et al. 2019, arXiv 1910.10683.
"""

import re
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from easyllm.core.config import Config
from easyllm.corpus.clean.text import CLOSING_QUOTES, TERMINAL_PUNCTUATION, TextView
from easyllm.corpus.clean.violation import Metric, Violation, first_violation

LOREM_IPSUM = "lorem ipsum"
POLICY_PHRASES = (
    *("terms of use", "privacy policy", "cookie policy"),
    *("uses cookies", "use of cookies", "use cookies"),
)

_LINE_ENDS = tuple(TERMINAL_PUNCTUATION | CLOSING_QUOTES)
_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
_QUOTES = "".join(sorted(CLOSING_QUOTES)) + r")\]"
# A punctuation mark and a space within a line; not an ellipsis, not an initial ("J. Smith")
SENTENCE_BREAK = re.compile(rf"[.!?](?<!\.\.\.)(?<!\b[A-Z]\.)[{_QUOTES}]*[^\S\n]+(?=\S)")
FULL_WIDTH_SENTENCE_BREAK = re.compile(rf"[。！？][{_QUOTES}]*(?=[^\n。！？])")


class C4Quality(Config):
    """Keeps the lines that look like sentences; rejects pages with too few of them.

    Pages with code or filler text are rejected too.

    Source: arXiv 1910.10683, section 2.2; the limit on word length, the citations and the policy
    phrases come from the published code. The words of a line are separated by white space, so this
    rule is not suitable for Chinese. The tests for "lorem ipsum" and "{" cover the full page, as
    the paper says. FineWeb uses `terminal_punctuation=False`. The bad-word list is omitted, as in
    FineWeb.
    """

    kind: Literal["c4_quality"] = "c4_quality"
    terminal_punctuation: bool = Field(
        True, description="Drop lines that do not end in `.`, `!`, `?` or a quotation mark."
    )
    min_words_per_line: NonNegativeInt = Field(3, description="Drop lines with fewer words.")
    max_word_length: PositiveInt | None = Field(
        1000, description="Drop lines with a longer word, in characters; null keeps them."
    )
    min_sentences: NonNegativeInt = Field(
        5, description="Reject pages with fewer sentences in the remaining lines."
    )
    remove_citations: bool = Field(
        True, description="Remove citation marks such as `[1]`, `[edit]` and `[citation needed]`."
    )
    drop_javascript_lines: bool = Field(True, description="Drop lines that mention JavaScript.")
    drop_policy_lines: bool = Field(
        True, description="Drop lines about cookies, privacy policies and terms of use."
    )
    reject_lorem_ipsum: bool = Field(True, description='Reject pages that contain "lorem ipsum".')
    reject_curly_brackets: bool = Field(True, description="Reject pages that contain `{`.")

    def apply(self, view: TextView) -> TextView | Violation:
        """Returns the text with only the lines that pass, or the violation that rejects it."""
        lowered = view.text.lower()
        if self.reject_lorem_ipsum and LOREM_IPSUM in lowered:
            return Violation(f"{self.kind}.lorem_ipsum", lowered.count(LOREM_IPSUM))
        if self.reject_curly_brackets and "{" in view.text:
            return Violation(f"{self.kind}.curly_brackets", view.text.count("{"))
        # Few pages contain any of the phrases: search the page once before searching every line
        phrases = tuple(phrase for phrase in self._unwanted_phrases() if phrase in lowered)
        kept = "\n".join(line for line in self._lines(view) if self._keeps(line, phrases))
        figure = Metric("sentences", count_sentences(kept), low=self.min_sentences)
        return first_violation(self.kind, [figure]) or view.with_text(kept)

    def _unwanted_phrases(self) -> tuple[str, ...]:
        javascript = ("javascript",) if self.drop_javascript_lines else ()
        return javascript + (POLICY_PHRASES if self.drop_policy_lines else ())

    def _lines(self, view: TextView) -> list[str]:
        if self.remove_citations and "[" in view.text:
            return view.with_text(_CITATION.sub("", view.text)).lines
        return view.lines

    def _keeps(self, line: str, phrases: tuple[str, ...]) -> bool:
        if self.terminal_punctuation and (not line.endswith(_LINE_ENDS) or line.endswith("...")):
            return False
        # Split off no more words than needed to decide
        if len(line.split(None, self.min_words_per_line)) < self.min_words_per_line:
            return False
        longest = self.max_word_length
        if longest is not None and len(line) > longest < max(map(len, line.split())):
            return False
        if phrases:
            lowered = line.lower()
            return not any(phrase in lowered for phrase in phrases)
        return True


def count_sentences(text: str) -> int:
    """Returns the number of sentences: one per line, plus one per sentence break within a line.

    >>> count_sentences("Dr. J. Smith said... nothing. Why? 不知道。真的。\\nEnd")
    6
    """
    lines = text.count("\n") + 1 if text else 0
    full_width = 0 if text.isascii() else len(FULL_WIDTH_SENTENCE_BREAK.findall(text))
    return lines + len(SENTENCE_BREAK.findall(text)) + full_width
