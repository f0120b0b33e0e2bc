"""What a build kept and what it did not: counts for scripts, and the report for people."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Counts = list[tuple[str, list[dict[str, Any]]]]
"""Stages that remove documents, each with the counts of its items, one a split."""
REASONS_SHOWN = 3


def removals(counts: Counts, read: int) -> list[dict[str, Any]]:
    """Documents removed by each rule of each stage, with their share of all that were read, most first in each stage."""
    rows = []
    for stage, done in counts:
        by_rule = Counter[str]()
        for item in done:
            by_rule.update(_removed(stage, item))
        for rule, number in _most_first(by_rule):
            share = number / max(1, read)
            rows.append({"stage": stage, "rule": rule, "documents": number, "share": share})
    return rows


def fates(counts: Counts, sources: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each source how many documents were read, how many are left, and how many each rule removed, most first.

    Also which rows could not be read, and in which languages the documents were that were refused for theirs.

    Args:
        sources: the source of each split.
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
    items: list[dict[str, Any]], sources: Sequence[str], name: str, key: str
) -> dict[str, int]:
    total = Counter[str]()
    for source, item in zip(sources, items, strict=True):
        if source == name:
            total.update(item.get(key, {}))  # counts of an older version may lack it
    return dict(_most_first(total))


def reasons(by_rule: Mapping[str, int]) -> str:
    """The rules that did most, in a few words: `length.words 12, exact 3 and 2 more`."""
    shown = [f"{rule} {number:,}" for rule, number in list(by_rule.items())[:REASONS_SHOWN]]
    more = len(by_rule) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def notes(summary: dict[str, Any]) -> list[str]:
    """What a person should not overlook: sources of which nothing is left, rows that could not be read, private data."""
    lines = [
        f"nothing is left of source {name!r} ({reasons(fate['removed']) or 'it held no document'}): "
        f"give it rules of its own (sources.{name}.clean) if that is not meant"
        for name, fate in summary["sources"].items()
        if not fate["kept"]
    ]
    if summary["bad_rows"]:
        count = sum(summary["bad_rows"].values())
        lines.append(
            f"rows no document could be made of: {count:,} ({_listed(summary['bad_rows'])})"
        )
    if summary["private"]:
        lines.append(f"private data found, {_listed(summary['private'])}")
    return lines


SOURCE_COLUMNS = ("source", "read", "kept", "held out", "packed", "tokens", "wanted", "epochs")


def source_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row of `SOURCE_COLUMNS` for each source; all but the tokens count documents."""
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


def removal_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row of `REMOVAL_COLUMNS` for each rule that removed documents."""
    return [
        (row["stage"], row["rule"], f"{row['documents']:,}", f"{row['share']:.1%}")
        for row in summary["removed"]
    ]


def headline(summary: dict[str, Any]) -> str:
    """The whole in one sentence."""
    held = f", {summary['held_out']:,} held out for validation" if summary["held_out"] else ""
    return (
        f"{summary['documents_read']:,} documents read, {summary['documents_kept']:,} kept{held}, "
        f"{summary['documents']:,} packed as {summary['tokens']:,} tokens "
        f"({summary['bytes_per_token']:.2f} bytes of text a token)"
    )


def report(name: str, summary: dict[str, Any]) -> str:
    """The report as Markdown."""
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
        "Every removed document is in `excluded/` with the rule and the figure that broke its bound; "
        "`clusters.jsonl.zst` says which document stands for each duplicate.",
    ]
    return "\n".join(lines) + "\n"


def _removed(stage: str, item: dict[str, Any]) -> dict[str, int]:
    """Documents an item removed, by rule."""
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
