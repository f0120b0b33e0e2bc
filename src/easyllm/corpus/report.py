"""Summary of a corpus build: counts of kept and removed documents, and the Markdown report."""

from collections import Counter
from collections.abc import Mapping, Sequence

from easyllm.core.json_types import JsonObject

Counts = list[tuple[str, list[JsonObject]]]
"""Stages that remove documents, each with the counts of its work items, one per split."""
REASONS_SHOWN = 3


def removals(counts: Counts, read: int) -> list[JsonObject]:
    """Returns the number of documents removed by each rule of each stage.

    Args:
        counts: the counts of every stage.
        read: number of documents read.

    Returns:
        Rows with `stage`, `rule`, `documents` and `share` (of the documents read), sorted by
        descending count within each stage.
    """
    rows = []
    for stage, done in counts:
        by_rule = Counter[str]()
        for item in done:
            by_rule.update(_removed(stage, item))
        for rule, number in _most_first(by_rule):
            share = number / max(1, read)
            rows.append({"stage": stage, "rule": rule, "documents": number, "share": share})
    return rows


def counts_by_source(counts: Counts, sources: Sequence[str]) -> dict[str, JsonObject]:
    """Returns what happened to the documents of each source.

    Args:
        counts: the counts of every stage.
        sources: the source of each split.

    Returns:
        For each source: `read` and `kept` documents, `removed` documents by rule, `bad_rows` by
        kind of error, and `languages` of the documents rejected by the language rule. Counts are
        sorted in descending order.
    """
    _, first = counts[0]
    _, last = counts[-1]
    removed = {name: Counter[str]() for name in sources}
    for stage, done in counts:
        for name, item in zip(sources, done, strict=True):
            removed[name].update(_removed(stage, item))
    return {
        name: {
            "read": sum(i["documents"] for n, i in zip(sources, first, strict=True) if n == name),
            "kept": sum(i["kept"] for n, i in zip(sources, last, strict=True) if n == name),
            "removed": dict(_most_first(by_rule)),
            "bad_rows": _of_source(first, sources, name, "bad_rows"),
            "languages": _of_source(first, sources, name, "languages"),
        }
        for name, by_rule in removed.items()
    }


def _of_source(
    items: list[JsonObject], sources: Sequence[str], name: str, key: str
) -> dict[str, int]:
    total = Counter[str]()
    for source, item in zip(sources, items, strict=True):
        if source == name:
            total.update(item.get(key, {}))  # counts written by an older version may lack the key
    return dict(_most_first(total))


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


def _removed(stage: str, item: JsonObject) -> dict[str, int]:
    """Returns the number of documents that a work item removed, by rule."""
    if "removed" in item:
        return {stage.rsplit("-", 1)[-1]: item["removed"]}
    found: dict[str, int] = item["rejected_by_rule"]
    return found


def _most_first(by_rule: Counter[str]) -> list[tuple[str, int]]:
    found = sorted(by_rule.items(), key=lambda pair: (-pair[1], pair[0]))
    return [(rule, number) for rule, number in found if number]


def _listed(numbers: Mapping[str, int]) -> str:
    return "; ".join(f"{name}: {number:,}" for name, number in numbers.items())


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    texts = {"source", "stage", "rule"}
    rule = ["---" if column in texts else "---:" for column in columns]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]
