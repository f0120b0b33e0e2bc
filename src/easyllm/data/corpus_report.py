"""What a build kept and what it did not, for people."""

from collections import Counter
from typing import Any

from easyllm.data.corpus import CorpusConfig

Counts = list[tuple[str, list[dict[str, Any]]]]


def removals(counts: Counts, read: int) -> list[dict[str, Any]]:
    """Documents removed by each rule of each stage, with their share of all that were read, most first in each stage."""
    rows = []
    for stage, done in counts:
        by_rule = Counter[str]()
        for item in done:
            by_rule.update(item.get("rejected_by_rule", {}))
            by_rule.update({stage.rsplit("-", 1)[-1]: item["removed"]} if "removed" in item else {})
        for rule, number in sorted(by_rule.items(), key=lambda pair: (-pair[1], pair[0])):
            if number:
                rows.append(
                    {
                        "stage": stage,
                        "rule": rule,
                        "documents": number,
                        "share": number / max(1, read),
                    }
                )
    return rows


def report(config: CorpusConfig, summary: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"# {config.name}",
        "",
        f"{summary['documents_read']:,} documents read, {summary['documents_kept']:,} kept, "
        f"{summary['documents']:,} packed as {summary['tokens']:,} tokens "
        f"({summary['bytes_per_token']:.2f} bytes of text a token).",
        "",
        "## Removed",
        "",
        "| stage | rule | documents | of read |",
        "| --- | --- | ---: | ---: |",
    ]
    lines += [
        f"| {row['stage']} | {row['rule']} | {row['documents']:,} | {row['share']:.1%} |"
        for row in summary["removed"]
    ]
    lines += ["", "## Composition", "", "| source | documents | tokens | wanted | epochs |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {name} | {c['documents']:,} | {c['tokens']:,} | {c['wanted']:,} | {c['epochs']:.2f} |"
        for name, c in summary["composition"].items()
    ]
    if summary["private"]:
        found = ", ".join(f"{kind} {number:,}" for kind, number in summary["private"].items())
        lines += ["", "## Private data", "", f"Found: {found}."]
    if summary["bad_rows"]:
        lines += ["", "## Bad rows", ""]
        lines += [f"- {reason}: {number:,}" for reason, number in summary["bad_rows"].items()]
        lines += ["", "Such as:", ""]
        lines += [f"- {row}" for row in summary["bad_rows_shown"][:10]]
    lines += [
        "",
        "Every removed document is in `excluded/` with the rule and the figure that broke its bound; "
        "`clusters.jsonl.zst` says which document stands for each duplicate.",
    ]
    return "\n".join(lines) + "\n"
