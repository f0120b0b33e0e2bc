"""Warnings about a finished build: rules, bad rows or languages that removed most of a source."""

from collections.abc import Mapping

from easyllm.corpus.clean.language import CHINESE
from easyllm.corpus.report import SourceCounts, most_first, total

MAX_SHARE = 0.5
"""Share of a source's documents that one rule may remove before there is a warning."""
MIN_KEPT_SHARE = 1 / 3
"""Share of kept documents of a source below which the top rules are reported together."""
MIN_TOTAL_SHARE = 0.05
"""Share of all documents below which the result is probably not what the user intended."""
NUM_RULES = 3
"""Number of rules reported where no single rule removed most of the documents."""
MIN_DOCUMENTS = 10
"""Number of documents below which shares are not meaningful."""

Fates = Mapping[str, SourceCounts]


def warnings(sources: Fates) -> list[str]:
    """Returns what the user should know before using the corpus, most important first.

    Args:
        sources: for each source, the counts from `counts_by_source`.
    """
    read = sum(fate.read + _num_bad(fate) for fate in sources.values())
    kept = sum(fate.kept for fate in sources.values())
    lines = []
    if read >= MIN_DOCUMENTS and kept < MIN_TOTAL_SHARE * read:
        lines.append(
            f"only {kept:,} of {read:,} documents remain ({kept / read:.1%}): "
            "this is probably not the intended corpus"
        )
    for name, fate in sources.items():
        lines += _of_source(name, fate)
    return lines


def explain_empty_corpus(sources: Fates, shown: list[str]) -> str:
    """Returns the reason and the remedy, in one line, when no documents remain.

    Args:
        sources: for each source, the counts from `counts_by_source`.
        shown: some bad rows, each with its location.
    """
    bad = sum(_num_bad(fate) for fate in sources.values())
    removed = most_first(total(fate.removed for fate in sources.values()))
    if not removed and not bad:
        return "(the sources contain none); check their paths"
    if not removed:
        more = f", and {bad - 1:,} more rows" if bad > 1 else ""
        kinds = most_first(total(fate.bad_rows for fate in sources.values()))
        return f"({shown[0]}{more}); {_remedy_of_row(next(iter(kinds)))}"
    listed = ", ".join(f"{rule} {number:,}" for rule, number in list(removed.items())[:5])
    if bad > sum(removed.values()):
        listed += f"; {bad:,} rows could not be read, such as {shown[0]}"
    languages = most_first(total(fate.languages for fate in sources.values()))
    return f"({listed}); {_remedy(next(iter(removed)), languages)}"


def _of_source(name: str, fate: SourceCounts) -> list[str]:
    lines = []
    bad, read = _num_bad(fate), fate.read
    if bad + read >= MIN_DOCUMENTS and bad > MAX_SHARE * (bad + read):
        kind, number = _first(fate.bad_rows)
        lines.append(
            f"{bad:,} of the {bad + read:,} rows of source {name!r} could not be read "
            f"({kind}: {number:,}); {_remedy_of_row(kind)}"
        )
    if read >= MIN_DOCUMENTS and fate.removed:
        rule, number = _first(fate.removed)
        if number > MAX_SHARE * read:
            lines.append(
                f"rule {rule} removed {number:,} of the {read:,} documents of source {name!r} "
                f"({number / read:.0%}); {_remedy(rule, fate.languages)}, or give the source "
                f"its own rules (sources.{name}.clean)"
            )
        elif fate.kept < MIN_KEPT_SHARE * read:
            most = sorted(fate.removed.items(), key=lambda item: (-item[1], item[0]))[:NUM_RULES]
            listed = ", ".join(f"{rule} {number:,} ({number / read:.0%})" for rule, number in most)
            lines.append(
                f"only {fate.kept:,} of the {read:,} documents of source {name!r} were kept "
                f"({fate.kept / read:.0%}); the rules that removed most are {listed}: "
                f"{_remedy(rule, fate.languages)}, or give the source its own rules "
                f"(sources.{name}.clean)"
            )
    return lines


def _remedy(rule: str, languages: Mapping[str, int]) -> str:
    kind, _, figure = rule.partition(".")
    if kind == "language" and figure == "code" and languages:
        language, number = _first(languages)
        if language in CHINESE:
            return f"{number:,} are in Chinese: use clean.preset=fineweb-zh or gopher-zh"
        return (
            f"{number:,} are in {language!r}: allow it (clean.override.language.allowed), "
            "or name sources in the intended language"
        )
    if not figure:
        return "they are duplicates: check the source, or the deduplication step"
    return f"loosen the rules (clean.override.{kind}) or check the source"


def _remedy_of_row(kind: str) -> str:
    if kind.startswith("no key") or "of type" in kind or "is empty" in kind:
        return "set text_key to the key that contains the text"
    if kind.startswith("not UTF-8"):
        return "convert the files to UTF-8"
    if kind.startswith("not JSON"):
        return "check the files, or set format"
    return "check the files"


def _num_bad(fate: SourceCounts) -> int:
    return sum(fate.bad_rows.values())


def _first(counts: Mapping[str, int]) -> tuple[str, int]:
    return max(counts.items(), key=lambda item: item[1])
