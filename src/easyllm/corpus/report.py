"""Summary of a corpus build: counts of kept and removed documents, and the Markdown report."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from easyllm.core.json_types import JsonObject
from easyllm.corpus.items import CleanCounts, DedupCounts

REASONS_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCounts:
    """The counts of the stages that remove documents, one value per split.

    Attributes:
        clean: the counts of the first stage, `clean`.
        dedup: the counts of each deduplication stage, by name, in order.
    """

    clean: Sequence[CleanCounts]
    dedup: dict[str, Sequence[DedupCounts]] = field(default_factory=dict)

    @property
    def documents_read(self) -> int:
        """The number of documents in all splits."""
        return sum(split.documents for split in self.clean)

    @property
    def bad_rows_shown(self) -> list[str]:
        """Some bad rows of all splits, each with its location and reason."""
        return [row for split in self.clean for row in split.bad_rows_shown]

    def kept(self) -> list[int]:
        """Returns the number of documents that remain of each split."""
        last = next(reversed(self.dedup.values()), None)
        return [split.kept for split in (self.clean if last is None else last)]

    def removed(self) -> dict[str, list[Mapping[str, int]]]:
        """Returns, for each stage, the number of documents removed from each split by rule."""
        stages: dict[str, list[Mapping[str, int]]] = {
            "clean": [split.rejected_by_rule for split in self.clean]
        }
        for stage, splits in self.dedup.items():
            rule = stage.rsplit("-", 1)[-1]
            stages[stage] = [{rule: split.removed} for split in splits]
        return stages


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What one rule removed in one stage.

    Attributes:
        stage: name of the stage.
        rule: name of the rule.
        documents: number of documents removed.
        share: fraction of the documents read.
    """

    stage: str
    rule: str
    documents: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCounts:
    """What happened to the documents of one source; mappings are in descending order of counts.

    Attributes:
        read: number of documents read.
        kept: number of documents that remain.
        removed: rule -> number of documents it removed.
        bad_rows: kind of error -> number of rows that are not documents.
        languages: language -> number of documents rejected by the language rule.
    """

    read: int
    kept: int
    removed: dict[str, int]
    bad_rows: dict[str, int]
    languages: dict[str, int]


def removals(counts: StageCounts) -> list[Removal]:
    """Returns the number of documents removed by each rule of each stage.

    Stages are in order, and the rules of a stage in descending order of documents.
    """
    read = max(1, counts.documents_read)
    return [
        Removal(stage=stage, rule=rule, documents=number, share=number / read)
        for stage, splits in counts.removed().items()
        for rule, number in most_first(total(splits)).items()
    ]


def counts_by_source(counts: StageCounts, sources: Sequence[str]) -> dict[str, SourceCounts]:
    """Returns what happened to the documents of each source.

    Args:
        counts: the counts of every stage.
        sources: the source of each split.
    """
    kept, stages = counts.kept(), counts.removed().values()
    found = {}
    for name in dict.fromkeys(sources):
        mine = [i for i, source in enumerate(sources) if source == name]
        splits = [counts.clean[i] for i in mine]
        found[name] = SourceCounts(
            read=sum(split.documents for split in splits),
            kept=sum(kept[i] for i in mine),
            removed=most_first(total(stage[i] for stage in stages for i in mine)),
            bad_rows=most_first(total(split.bad_rows for split in splits)),
            languages=most_first(total(split.languages for split in splits)),
        )
    return found


def total(parts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """Returns the sum of counts by name."""
    found = Counter[str]()
    for part in parts:
        found.update(part)
    return found


def most_first(counts: Mapping[str, int]) -> dict[str, int]:
    """Returns the counts that are not zero in descending order, equal ones by name."""
    found = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return {name: number for name, number in found if number}


def reasons(by_rule: Mapping[str, int]) -> str:
    """Returns the top rules in short form, such as `length.words 12, exact 3 and 2 more`."""
    shown = [f"{rule} {number:,}" for rule, number in list(by_rule.items())[:REASONS_SHOWN]]
    more = len(by_rule) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def notes(summary: JsonObject) -> list[str]:
    """Returns notes for the user: sources without remaining documents, bad rows, private data."""
    lines = [
        f"no documents remain from source {name!r} "
        f"({reasons(fate['removed']) or 'it contained no documents'}): "
        f"give it its own rules (sources.{name}.clean) if this is not intended"
        for name, fate in summary["sources"].items()
        if not fate["kept"]
    ]
    if summary["bad_rows"]:
        count = sum(summary["bad_rows"].values())
        lines.append(
            f"rows that could not be read as documents: {count:,} ({_listed(summary['bad_rows'])})"
        )
    if summary["private"]:
        lines.append(f"private data found: {_listed(summary['private'])}")
    return lines


SOURCE_COLUMNS = ("source", "read", "kept", "held out", "packed", "tokens", "wanted", "epochs")


def source_rows(summary: JsonObject) -> list[tuple[str, ...]]:
    """Returns a row of `SOURCE_COLUMNS` for each source.

    `tokens` and `wanted` count tokens; the other counts are documents.
    """
    return [
        (
            name,
            f"{fate['read']:,}",
            f"{fate['kept']:,}",
            f"{fate['held_out']:,}",
            f"{(c := summary['composition'][name])['documents']:,}",
            f"{c['tokens']:,}",
            f"{c['wanted']:,}",
            f"{c['epochs']:.2f}",
        )
        for name, fate in summary["sources"].items()
    ]


REMOVAL_COLUMNS = ("stage", "rule", "documents", "of read")


def removal_rows(summary: JsonObject) -> list[tuple[str, ...]]:
    """Returns a row of `REMOVAL_COLUMNS` for each rule that removed documents."""
    return [
        (row["stage"], row["rule"], f"{row['documents']:,}", f"{row['share']:.1%}")
        for row in summary["removed"]
    ]


def headline(summary: JsonObject) -> str:
    """Returns the summary in one sentence, without the final period."""
    held = f", {summary['held_out']:,} held out for validation" if summary["held_out"] else ""
    return (
        f"{summary['documents_read']:,} documents read, {summary['documents_kept']:,} kept{held}, "
        f"{summary['documents']:,} packed as {summary['tokens']:,} tokens "
        f"({summary['bytes_per_token']:.2f} bytes of text per token)"
    )


def report(name: str, summary: JsonObject) -> str:
    """Returns the report as Markdown.

    Args:
        name: the name of the corpus, which is the title.
        summary: the statistics in the manifest of the build.
    """
    lines = [f"# {name}", "", f"{headline(summary)}.", "", "## Sources", ""]
    lines += _table(SOURCE_COLUMNS, source_rows(summary))
    if summary["removed"]:
        lines += ["", "## Removed", ""]
        lines += _table(REMOVAL_COLUMNS, removal_rows(summary))
    if summary["warnings"]:
        lines += ["", "## Warnings", "", *(f"- {line}" for line in summary["warnings"])]
    if lines_of_notes := notes(summary):
        lines += ["", "## Notes", "", *(f"- {line}" for line in lines_of_notes)]
    if summary["bad_rows"]:
        lines += ["", "## Bad rows", ""]
        lines += [f"- {row}" for row in summary["bad_rows_shown"][:10]]
    lines += [
        "",
        "Every removed document is in `excluded/` with the rule and the value that violated it; "
        "`clusters.jsonl.zst` lists the document that was kept in place of each duplicate.",
    ]
    return "\n".join(lines) + "\n"


def _listed(numbers: Mapping[str, int]) -> str:
    return "; ".join(f"{name}: {number:,}" for name, number in numbers.items())


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    texts = {"source", "stage", "rule"}
    rule = ["---" if column in texts else "---:" for column in columns]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]
