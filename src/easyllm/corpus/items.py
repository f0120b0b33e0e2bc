"""Work items of a corpus build and the counts that they return, one class for each kind of work.

The fields of an item are nested as in its JSON form (corpus/codec), whose hash is recorded with the
finished work: a field that is renamed, added or removed makes finished work of an older version
unusable. The counts are recorded in the order of their fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, Self, TypeAlias

from easyllm.corpus.clean import CleanConfig, CleanReport
from easyllm.corpus.dedup.config import DedupStep
from easyllm.corpus.privacy import PrivacyConfig
from easyllm.corpus.sources import SourceConfig, Split

FileStamp: TypeAlias = tuple[str, int, int]
"""A file's path, size in bytes and modification time in nanoseconds."""


class WorkItem(Protocol):
    """What all work items have in common."""

    @property
    def stem(self) -> Path:
        """The path stem of the output files."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanArguments:
    """Arguments of the `clean` work.

    Attributes:
        split: what to read.
        source: how to read it.
        rules: the cleaning rules; None skips cleaning.
        privacy: which personal data to redact; None skips redaction.
        evaluation: folder of a saved `Decontaminator`; None skips decontamination.
    """

    split: Split
    source: SourceConfig
    rules: CleanConfig | None
    privacy: PrivacyConfig | None
    evaluation: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanItem:
    """Reads a split, and cleans, redacts and decontaminates its documents.

    Attributes:
        stem: path stem of the output files.
        arguments: what to read, and what to do with the documents.
        inputs: the files of the split, and the hash of the evaluation folder, if any.
        work: the kind of work.
    """

    stem: Path
    arguments: CleanArguments
    inputs: tuple[tuple[FileStamp, ...], str | None]
    work: Literal["clean"] = "clean"


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanCounts:
    """What the `clean` work counted in one split.

    Attributes:
        documents: number of documents read.
        kept: number of documents that passed.
        rewritten: number of kept documents whose text was changed.
        rejected: number of rejected documents.
        rejected_by_rule: rule -> number of documents it rejected.
        languages: language -> number of documents rejected because of it; absent from the records
            of an older version.
        characters: number of characters in all documents before cleaning.
        characters_kept: number of characters in the kept documents after cleaning.
        private: kind of personal data -> number of findings.
        bad_rows: kind of error -> number of rows that are not documents.
        bad_rows_shown: the first bad rows, each with its location and reason.
    """

    documents: int
    kept: int
    rewritten: int
    rejected: int
    rejected_by_rule: dict[str, int]
    languages: dict[str, int] = field(default_factory=dict)
    characters: int
    characters_kept: int
    private: dict[str, int]
    bad_rows: dict[str, int]
    bad_rows_shown: tuple[str, ...]

    @classmethod
    def from_report(
        cls,
        report: CleanReport,
        *,
        private: Mapping[str, int],
        bad_rows: Mapping[str, int],
        bad_rows_shown: tuple[str, ...],
    ) -> Self:
        """Returns the counts of a report, together with the other counts of the split."""
        return cls(
            documents=report.documents,
            kept=report.kept,
            rewritten=report.rewritten,
            rejected=report.rejected.total(),
            rejected_by_rule=report.rejected_by_rule(),
            languages=dict(report.languages),
            characters=report.characters,
            characters_kept=report.characters_kept,
            private=dict(private),
            bad_rows=dict(bad_rows),
            bad_rows_shown=bad_rows_shown,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyArguments:
    """Arguments of the `dedup_keys` work: the file of the split's documents, and the step."""

    documents: Path
    step: DedupStep


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyItem:
    """Computes the hashes of a split's documents that one deduplication step compares.

    Attributes:
        stem: the output folder.
        arguments: what to hash.
        inputs: hash of the record of the work that wrote the documents.
        work: the kind of work.
    """

    stem: Path
    arguments: KeyArguments
    inputs: str
    work: Literal["dedup_keys"] = "dedup_keys"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyCounts:
    """The number of documents that the `dedup_keys` work hashed."""

    documents: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupArguments:
    """Arguments of the `dedup_apply` work.

    Attributes:
        documents: file of the split's documents.
        decision: the `.npz` file with the decision for this split.
        step: the deduplication step.
    """

    documents: Path
    decision: Path
    step: DedupStep


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupItem:
    """Applies the decision of a deduplication step to a split.

    Attributes:
        stem: path stem of the output files.
        arguments: the documents and the decision.
        inputs: hash of the file with the decision.
        work: the kind of work.
    """

    stem: Path
    arguments: DedupArguments
    inputs: str
    work: Literal["dedup_apply"] = "dedup_apply"


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupCounts:
    """What the `dedup_apply` work counted in one split.

    Attributes:
        kept: number of kept documents.
        removed: number of removed documents.
        parts: number of parts removed from the documents.
        characters_kept: number of characters in the kept documents.
    """

    kept: int
    removed: int
    parts: int
    characters_kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeArguments:
    """Arguments of the `tokenize` work.

    Attributes:
        documents: file of the split's documents.
        tokenizer: folder of the tokenizer.
        end_id: appended to every document, if not None.
    """

    documents: Path
    tokenizer: Path
    end_id: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeItem:
    """Tokenizes the documents of a split.

    Attributes:
        stem: path stem of the output files.
        arguments: the documents and the tokenizer.
        inputs: hash of the record of the work that wrote the documents, and the fingerprint of the
            tokenizer.
        work: the kind of work.
    """

    stem: Path
    arguments: TokenizeArguments
    inputs: tuple[str, str]
    work: Literal["tokenize"] = "tokenize"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """What the `tokenize` work counted in one split: documents, token ids and UTF-8 bytes."""

    documents: int
    tokens: int
    bytes: int
