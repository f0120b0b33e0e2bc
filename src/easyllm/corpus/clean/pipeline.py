"""Applies a chain of rules to documents, and counts the kept and rejected documents."""

from collections import Counter
from dataclasses import dataclass, field, replace

from pydantic import Field, model_validator

from easyllm.core.config import Config, validate
from easyllm.core.errors import suggest
from easyllm.core.json_types import JsonObject
from easyllm.corpus.clean.presets import PRESETS, PresetName, Rule
from easyllm.corpus.clean.text import TextView
from easyllm.corpus.clean.violation import Violation
from easyllm.corpus.document import Document, Rejection


class CleanConfig(Config):
    """Which rules clean a corpus, in order."""

    preset: PresetName | None = Field(
        "fineweb", description="Published chain of rules to start from; null for none."
    )
    override: dict[str, JsonObject] = Field(
        default_factory=dict,
        description="Fields of the preset's rules to change, by kind of the rule, such as "
        "`{language: {allowed: [de]}}`.",
    )
    without: tuple[str, ...] = Field((), description="Kinds of the preset's rules to omit.")
    rules: tuple[Rule, ...] = Field(
        (), description="Additional rules, applied after those of the preset."
    )

    @model_validator(mode="after")
    def _check(self) -> "CleanConfig":
        kinds = [rule.kind for rule in self._preset_rules()]
        for kind in (*self.override, *self.without):
            if kind not in kinds:
                known = ", ".join(kinds) or "none, since no preset is set"
                raise ValueError(
                    f"{kind!r} is not a rule of the preset {self.preset!r} "
                    f"(its rules: {known}){suggest(kind, kinds)}"
                )
        self.chain()
        return self

    def chain(self) -> tuple[Rule, ...]:
        """Returns the rules in the order in which they run."""
        kept = (rule for rule in self._preset_rules() if rule.kind not in self.without)
        return (*(self._overridden(rule) for rule in kept), *self.rules)

    def _preset_rules(self) -> tuple[Rule, ...]:
        return () if self.preset is None else PRESETS[self.preset]

    def _overridden(self, rule: Rule) -> Rule:
        changes = self.override.get(rule.kind)
        if not changes:
            return rule
        values = {**rule.model_dump(), **changes}
        return validate(type(rule), values, source=f"override.{rule.kind}")


class Cleaner:
    """Applies a chain of rules to documents, one at a time.

    A cleaner has no mutable state and can be pickled.

    >>> cleaner = Cleaner(CleanConfig(preset=None, rules=[{"kind": "length", "min_words": 3}]))
    >>> rejection = cleaner.clean(Document(id="1", source="demo", text="Too short."))
    >>> rejection.rule, rejection.value
    ('length.words', 2)
    """

    def __init__(self, config: CleanConfig) -> None:
        self.config = config
        self._chain = config.chain()

    def clean(self, document: Document) -> Document | Rejection:
        """Returns the document as rewritten by the rules, or its rejection by the first that fails.

        The document gets the language that was identified, if any. A rejection contains the
        original document, except for the language.

        Raises:
            EasyllmError: a rule needs a package that is not installed.
        """
        view = TextView(document.text, document.language)
        for rule in self._chain:
            result = rule.apply(view)
            if isinstance(result, Violation):
                refused = replace(document, language=view.language)
                return Rejection(document=refused, rule=result.rule, value=result.value)
            view = result
        return replace(document, text=view.text, language=view.language)


@dataclass(slots=True, kw_only=True)
class CleanReport:
    """Counts of cleaned documents; each process has its own report, and `merge` adds them.

    Attributes:
        kept: number of documents that passed.
        rewritten: number of kept documents whose text was changed.
        rejected: rule -> number of documents it rejected.
        languages: language -> number of documents rejected because of it.
        characters: number of characters in all documents before cleaning.
        characters_kept: number of characters in the kept documents after cleaning.
    """

    kept: int = 0
    rewritten: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    characters: int = 0
    characters_kept: int = 0

    def count(self, document: Document, result: Document | Rejection) -> None:
        """Counts the result of cleaning one document.

        Args:
            document: the document before cleaning.
            result: what `Cleaner.clean` returned for it.
        """
        self.characters += len(document.text)
        if isinstance(result, Rejection):
            self.rejected[result.rule] += 1
            if result.rule == "language.code":
                self.languages[str(result.value)] += 1
        else:
            self.kept += 1
            self.rewritten += result.text != document.text
            self.characters_kept += len(result.text)

    @property
    def documents(self) -> int:
        """The number of documents, kept or rejected."""
        return self.kept + self.rejected.total()

    def rejected_by_rule(self) -> dict[str, int]:
        """Returns the number of documents that each rule rejected, in descending order."""
        return dict(sorted(self.rejected.items(), key=lambda item: (-item[1], item[0])))
