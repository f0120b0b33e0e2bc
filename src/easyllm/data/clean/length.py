"""Bounds on a document's length."""

from collections.abc import Iterator
from typing import Literal

from pydantic import NonNegativeInt, model_validator

from easyllm.core.config import Config
from easyllm.data.clean.text import TextView
from easyllm.data.clean.violation import Figure, Violation, check_order, first_violation


class DocumentLength(Config):
    """Rejects texts with too few or too many characters or words; punctuation marks are no words, a Han character is one."""

    kind: Literal["length"] = "length"
    min_characters: NonNegativeInt | None = None
    max_characters: NonNegativeInt | None = None
    min_words: NonNegativeInt | None = None
    max_words: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _check(self) -> "DocumentLength":
        check_order("characters", self.min_characters, self.max_characters)
        check_order("words", self.min_words, self.max_words)
        return self

    def figures(self, view: TextView) -> Iterator[Figure]:
        """The measurements with their bounds, each computed when it is asked for."""
        yield Figure("characters", len(view.text), self.min_characters, self.max_characters)
        if self.min_words is not None or self.max_words is not None:
            yield Figure("words", view.num_words, self.min_words, self.max_words)

    def apply(self, view: TextView) -> TextView | Violation:
        return first_violation(self.kind, self.figures(view)) or view
