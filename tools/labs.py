"""Runs all labs whole, and writes their numbers and figures into the pages of `docs/map`.

    python tools/labs.py [NAME ...] [--check]

For each lab: `docs/map/numbers/NAME.json`, `docs/map/figures/NAME.svg`, and in the pages of its
topic the table between `<!-- numbers NAME -->` and `<!-- end -->`; then `docs/map/results.md`.
`--check` runs nothing and reports pages whose tables differ from the files.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

from easyllm.lab import all_labs, find_lab, run_lab
from easyllm.lab.lab import Lab, Language
from easyllm.lab.page import OUTCOMES

MAP = Path(__file__).resolve().parents[1] / "docs" / "map"
BLOCK = re.compile(r"(<!-- numbers ([a-z0-9-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
HEADS: dict[Language, str] = {"en": "| number | value |", "zh": "| 数值 | 值 |"}
RESULTS = {
    "en": (
        "# Results of the labs\n\nEnglish · [中文](results.zh.md)\n\n"
        "What each lab saw, compared with what the article or paper says. "
        "Written by `make labs`.\n",
        "| topics | lab | claim | seen | outcome |",
    ),
    "zh": (
        "# 实验结果\n\n[English](results.md) · 中文\n\n"
        "每个实验看到的结果与文章或论文的说法对照。由 `make labs` 写出。\n",
        "| 条目 | 实验 | 说法 | 结果 | 结论 |",
    ),
}


def main() -> int:
    """Returns 1 if `--check` finds a page that differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        stale = [str(path) for path, text in pages() if path.read_text("utf-8") != text]
        sys.stdout.write("".join(f"{path}\n" for path in stale))
        return 1 if stale else 0
    for lab in [find_lab(name) for name in options.names] or all_labs().values():
        if lab.nightly:
            run(lab)
    for path, text in pages():
        path.write_text(text, encoding="utf-8")
    return 0


def run(lab: Lab) -> None:
    """Runs a lab and copies its numbers, with the texts of pages, and its figure."""
    with tempfile.TemporaryDirectory() as folder:
        done = run_lab(lab, Path(folder) / lab.name)
        figure = (Path(folder) / lab.name / "figure.svg").read_text(encoding="utf-8")
    shown = [[n.key, n.label.en, n.label.zh, n.shown()] for n in done.result.numbers]
    claims = [
        {
            language: [
                claim.claim.of(language),
                claim.seen.of(language),
                OUTCOMES[claim.outcome].of(language)
                + ("" if claim.reason is None else f": {claim.reason.of(language)}"),
            ]
            for language in ("en", "zh")
        }
        for claim in done.result.claims
    ]
    content = done.as_dict() | {"shown": shown, "pages": claims, "seconds": round(done.seconds)}
    for name, text in (
        (f"numbers/{lab.name}.json", json.dumps(content, ensure_ascii=False, indent=1) + "\n"),
        (f"figures/{lab.name}.svg", figure),
    ):
        path = MAP / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{lab.name}: {done.seconds:.0f} s\n")


def pages() -> list[tuple[Path, str]]:
    """Returns each page of the map with the text that it should have."""
    found = []
    for path in sorted(MAP.glob("*.md")):
        language: Language = "zh" if path.name.endswith(".zh.md") else "en"
        if path.name in ("results.md", "results.zh.md"):
            continue
        text = path.read_text(encoding="utf-8")
        found.append((path, BLOCK.sub(lambda m, lang=language: _filled(m, lang), text)))
    for language, name in (("en", "results.md"), ("zh", "results.zh.md")):
        found.append((MAP / name, _results(language)))
    return found


def _filled(match: re.Match[str], language: Language) -> str:
    content = _content(match[2])
    rows = [f"| {row[1 if language == 'en' else 2]} | {row[3]} |" for row in content["shown"]]
    return f"{match[1]}{HEADS[language]}\n| --- | --- |\n{chr(10).join(rows)}\n{match[4]}"


def _results(language: Language) -> str:
    intro, head = RESULTS[language]
    lines = [intro, head, "| --- | --- | --- | --- | --- |"]
    for lab in all_labs().values():
        if not (MAP / "numbers" / f"{lab.name}.json").is_file():
            continue
        rows = ", ".join(str(row) for row in lab.rows)
        for claim in _content(lab.name)["pages"]:
            cells = [cell.replace("|", "\\|") for cell in claim[language]]
            lines.append(f"| {rows} | `{lab.name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _content(name: str) -> dict:
    return json.loads((MAP / "numbers" / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
