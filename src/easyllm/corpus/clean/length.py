"""Filter by document length."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, NonNegativeInt, model_validator

from easyllm.core.config import Config
from easyllm.corpus.clean.text import TextView
from easyllm.corpus.clean.violation import Metric, Violation, check_order, first_violation


class DocumentLength(Config):
    """Rejects texts with too few or too many characters or words.

    Punctuation marks do not count as words; a Han character counts as one.
    """

    kind: Literal["length"] = "length"
    min_characters: NonNegativeInt | None = Field(None, description="Minimum number of characters.")
    max_characters: NonNegativeInt | None = Field(None, description="Maximum number of characters.")
    min_words: NonNegativeInt | None = Field(None, description="Minimum number of words.")
    max_words: NonNegativeInt | None = Field(None, description="Maximum number of words.")

    @model_validator(mode="after")
    def _check(self) -> "DocumentLength":
        check_order("characters", self.min_characters, self.max_characters)
        check_order("words", self.min_words, self.max_words)
        return self

    def figures(self, view: TextView) -> Iterator[Metric]:
        """Yields the metrics with their bounds, each computed lazily."""
        yield Metric("characters", len(view.text), self.min_characters, self.max_characters)
        if self.min_words is not None or self.max_words is not None:
            yield Metric("words", view.num_words, self.min_words, self.max_words)

    def apply(self, view: TextView) -> TextView | Violation:
        """Returns the view unchanged, or the violation that rejects it."""
        return first_violation(self.kind, self.figures(view)) or view
