"""Runs all labs whole, and writes their numbers and figures into the pages of `docs/map`.

    python tools/labs.py [NAME ...] [--folder DIR] [--check]

For each lab: `docs/map/numbers/NAME.json`, `docs/map/figures/NAME.svg`, and in the pages of its
topic the table between `<!-- numbers NAME -->` and `<!-- end -->`; then `docs/map/results.md`, the
list of pages in `docs/map/index.md`, and the link to the next page at the end of each page.
`--check` runs nothing and reports pages whose tables differ from the files. `--folder` is where the
lab runs; an evening that has been run there is not run again, and its page is `docs/evening.md`.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

from easyllm.lab import all_labs, find_lab, run_lab
from easyllm.lab.lab import CHAPTERS, Lab, Language
from easyllm.lab.page import OUTCOMES

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import machine  # noqa: E402 - of the benchmarks

MAP = ROOT / "docs" / "map"
BLOCK = re.compile(r"(<!-- numbers ([a-z0-9-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
LIST = re.compile(r"(<!-- pages -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NEXT = re.compile(r"^(?:Next: |下一页：)\[.*\]\(.*\)\n\Z", re.MULTILINE)
CHAPTERS_ZH = (
    *("综述", "词元", "注意力", "位置", "代价", "模型", "训练", "提示"),
    *("推理", "量化", "数据", "对齐"),
)
HEADS: dict[Language, str] = {"en": "| number | value |", "zh": "| 数值 | 值 |"}
LANGUAGES: dict[Language, str] = {"en": ".md", "zh": ".zh.md"}
FIXED = ("index", "results")
OUTSIDE = ("evening",)
"""Pages of labs that are in `docs`, not in `docs/map`."""
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
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        stale = [str(path) for path, text in pages() if path.read_text("utf-8") != text]
        sys.stdout.write("".join(f"{path}\n" for path in stale))
        return 1 if stale else 0
    for lab in [find_lab(name) for name in options.names] or all_labs().values():
        if lab.nightly or options.names:
            run(lab, options.folder)
    for path, text in pages():
        path.write_text(text, encoding="utf-8")
    return 0


def run(lab: Lab, folder: Path | None = None) -> None:
    """Runs a lab and copies its numbers, with the texts of pages, and its figure."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / lab.name if folder is None else folder
        done = run_lab(lab, place)
        figure = (place / "figure.svg").read_text(encoding="utf-8")
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
    if not lab.repeatable:  # its numbers are those of a machine
        content["machine"] = machine.row(lab.name)["machine"]
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
    for language, suffix in LANGUAGES.items():
        order = _order(suffix)
        for number, path in enumerate(order):
            text = path.read_text(encoding="utf-8")
            text = BLOCK.sub(lambda m, lang=language: _filled(m, lang), text)
            after = order[number + 1] if number + 1 < len(order) else MAP / f"results{suffix}"
            words = "Next: " if language == "en" else "下一页："
            link = f"{words}[{_title(after)}]({after.name})\n"
            found.append((path, NEXT.sub("", text).rstrip("\n") + f"\n\n{link}"))
        index = MAP / f"index{suffix}"
        table = _list(order, language)
        text = LIST.sub(lambda m, t=table: f"{m[1]}{t}\n{m[3]}", index.read_text("utf-8"))
        found.append((index, text))
        found.append((MAP / f"results{suffix}", _results(language)))
        for name in OUTSIDE:
            path = MAP.parent / f"{name}{suffix}"
            text = path.read_text(encoding="utf-8")
            found.append((path, BLOCK.sub(lambda m, lang=language: _filled(m, lang), text)))
    return found


def _order(suffix: str) -> list[Path]:
    """Returns the pages of one language in the order of their labs' chapters and topics."""
    paths = [p for p in MAP.glob(f"*{suffix}") if p.name[: -len(suffix)] not in FIXED]
    if suffix == ".md":
        paths = [path for path in paths if not path.name.endswith(".zh.md")]

    def key(path: Path) -> tuple[int, tuple[int, ...], str]:
        labs = _labs_on(path)
        chapter = min(CHAPTERS.index(lab.chapter) for lab in labs)
        return chapter, min(lab.rows for lab in labs), path.name

    return sorted(paths, key=key)


def _labs_on(path: Path) -> list[Lab]:
    """Returns the labs whose numbers a page shows."""
    names = [match[2] for match in BLOCK.finditer(path.read_text(encoding="utf-8"))]
    if not names:
        sys.exit(f"{path} has no table of numbers of a lab")
    return [find_lab(name) for name in names]


def _title(path: Path) -> str:
    if not path.is_file():
        return path.stem
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _list(order: list[Path], language: Language) -> str:
    head = "| chapter | topics | page |" if language == "en" else "| 章 | 条目 | 页面 |"
    lines = [head, "| --- | --- | --- |"]
    for path in order:
        labs = _labs_on(path)
        number = CHAPTERS.index(labs[0].chapter)
        chapter = CHAPTERS[number] if language == "en" else CHAPTERS_ZH[number]
        rows = sorted({row for lab in labs for row in lab.rows})
        topics = (", " if language == "en" else "、").join(map(str, rows))
        lines.append(f"| {chapter} | {topics} | [{_title(path)}]({path.name}) |")
    return "\n".join(lines)


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
