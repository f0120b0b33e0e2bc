"""Documents, as read from sources, kept or rejected by cleaning, and tokenized for packing."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text with its metadata.

    Attributes:
        id: unique within its source: the id in the row, else `file:line`.
        source: name of its source in the recipe.
        text: the text; raw or normalised, depending on the stage.
        language: ISO 639-1 code (`en`, `zh`), None if it has not been identified.
    """

    id: str
    source: str
    text: str
    language: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A document rejected by a rule.

    Attributes:
        document: the document.
        rule: name of the rule.
        value: value of the metric that violates the rule.
    """

    document: Document
    rule: str
    value: float | str
