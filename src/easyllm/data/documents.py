"""Documents: what sources yield, cleaning keeps or rejects, and packing tokenizes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text.

    Attributes:
        id: unique in its source: the row's own id, else `file:line`.
        source: the name of its source in the recipe.
        text: normalised or raw, as the stage says.
        language: an ISO 639-1 code (`en`, `zh`), None where nobody has looked.
    """

    id: str
    source: str
    text: str
    language: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A document a rule refused; `value` is the figure that broke the rule's bound."""

    document: Document
    rule: str
    value: float | str
