"""A chain of rules over documents, and the count of what it kept and refused."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import Field, model_validator

from easyllm.core.config import Config, validate
from easyllm.core.errors import suggest
from easyllm.data.clean.presets import PRESETS, PresetName, Rule
from easyllm.data.clean.text import TextView
from easyllm.data.clean.violation import Violation
from easyllm.data.documents import Document, Rejection


class CleanConfig(Config):
    """Which rules clean a corpus, in order.

    Attributes:
        preset: a published chain to start from; None for none.
        override: kind of a preset's rule -> fields to change (`{"language": {"allowed": ["de"]}}`).
        without: kinds of the preset's rules to leave out.
        rules: further rules, after the preset's.
    """

    preset: PresetName | None = "fineweb"
    override: dict[str, dict[str, Any]] = Field(default_factory=dict)
    without: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "CleanConfig":
        kinds = [rule.kind for rule in self._preset_rules()]
        for kind in (*self.override, *self.without):
            if kind not in kinds:
                known = ", ".join(kinds) or "none: no preset is chosen"
                raise ValueError(
                    f"{kind!r} is not a rule of the preset {self.preset!r} "
                    f"(its rules: {known}){suggest(kind, kinds)}"
                )
        self.chain()
        return self

    def chain(self) -> tuple[Rule, ...]:
        """The rules as they will run."""
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
    """Applies a chain of rules to documents, one at a time; it can be pickled, and holds nothing that changes.

    >>> cleaner = Cleaner(CleanConfig(preset=None, rules=[{"kind": "length", "min_words": 3}]))
    >>> cleaner.clean(Document(id="1", source="demo", text="Too short."))
    Rejection(document=Document(id='1', source='demo', text='Too short.', language=None), rule='length.words', value=2)
    """

    def __init__(self, config: CleanConfig) -> None:
        self.config = config
        self._chain = config.chain()

    def clean(self, document: Document) -> Document | Rejection:
        """The document as the rules rewrote it, with its language where one was identified, or what rejected it.

        A Rejection holds the document as it came, but for the language.

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
    """Counts of cleaned documents; each process keeps its own and the sum is `merge`d.

    Attributes:
        kept: documents that passed.
        rewritten: of these, how many came out with another text.
        rejected: rule -> documents it refused.
        languages: language -> documents refused for being in it.
        characters: in all documents as they came.
        characters_kept: in the kept documents as they left.
    """

    kept: int = 0
    rewritten: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    characters: int = 0
    characters_kept: int = 0

    def count(self, document: Document, result: Document | Rejection) -> None:
        """Notes what became of a document."""
        self.characters += len(document.text)
        if isinstance(result, Rejection):
            self.rejected[result.rule] += 1
            if result.rule == "language.code":
                self.languages[str(result.value)] += 1
        else:
            self.kept += 1
            self.rewritten += result.text != document.text
            self.characters_kept += len(result.text)

    @classmethod
    def merge(cls, reports: Iterable["CleanReport"]) -> "CleanReport":
        """The report of all the documents the given ones count."""
        total = cls()
        for report in reports:
            total.kept += report.kept
            total.rewritten += report.rewritten
            total.rejected.update(report.rejected)
            total.languages.update(report.languages)
            total.characters += report.characters
            total.characters_kept += report.characters_kept
        return total

    def as_dict(self) -> dict[str, Any]:
        """The counts for a manifest or a table; rules in order of how many documents they refused."""
        num_rejected = self.rejected.total()
        by_rule = sorted(self.rejected.items(), key=lambda item: (-item[1], item[0]))
        return {
            "documents": self.kept + num_rejected,
            "kept": self.kept,
            "rewritten": self.rewritten,
            "rejected": num_rejected,
            "rejected_by_rule": dict(by_rule),
            "languages": dict(self.languages),
            "characters": self.characters,
            "characters_kept": self.characters_kept,
        }
