"""Pages of the map: their tables and figures are the files' that the labs wrote."""

import json
import re
import sys
from pathlib import Path

import pytest

from easyllm.lab import all_labs
from easyllm.lab.page import OUTCOMES

ROOT = Path(__file__).resolve().parents[3]
MAP = ROOT / "docs" / "map"
sys.path.insert(0, str(ROOT / "tools"))
import labs as tool  # noqa: E402

PAGES = [path for path in sorted(MAP.glob("*.md")) if path.stem.split(".")[0] != "index"]
SECTIONS = {
    "en": ["Idea", "Equation", "In the code", "Run it", "What the article says", "Questions"],
    "zh": ["思想", "公式", "在代码中", "运行", "文章的说法", "自测"],
}


def test_tables_are_those_of_the_files():
    stale = [path.name for path, text in tool.pages() if path.read_text("utf-8") != text]
    assert stale == [], "run `python tools/labs.py` for the labs of these pages"


def test_every_lab_has_numbers_of_its_parameters_a_figure_and_a_place_on_a_page():
    text = "".join(path.read_text("utf-8") for path in PAGES)
    for lab in all_labs().values():
        if not lab.nightly:
            continue
        content = json.loads((MAP / "numbers" / f"{lab.name}.json").read_text("utf-8"))
        assert content["parameters"] == lab.parameters().model_dump(mode="json"), lab.name
        assert content["rows"] == list(lab.rows)
        assert (MAP / "figures" / f"{lab.name}.svg").is_file()
        for needed in (f"<!-- numbers {lab.name} -->", f"figures/{lab.name}.svg"):
            assert text.count(needed) >= 2, f"{needed} in English and in Chinese"
        assert f"easyllm lab {lab.name}" in text


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_has_all_sections_and_its_code_exists(path):
    if path.name.startswith("results"):
        return
    language = "zh" if path.name.endswith(".zh.md") else "en"
    text = path.read_text("utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [h for h in headings if h in SECTIONS[language]] == SECTIONS[language]
    names = re.findall(r"\[`(\w+)`\]\(\.\./\.\./(src/[\w/]+\.py)\)", text)
    assert names, "names a function or class with its file"
    for name, file in names:
        source = (ROOT / file).read_text("utf-8")
        assert re.search(rf"^(?:def|class) {name}\b|^{name}\b", source, re.MULTILINE), (name, file)


@pytest.mark.parametrize("name", ["results.md", "results.zh.md"])
def test_results_say_what_was_seen_for_each_of_the_72_topics(name):
    lines = (MAP / name).read_text("utf-8").splitlines()
    table = [line for line in lines if line.startswith("| ") and "`" in line]
    rows = {int(row) for line in table for row in line.split("|")[1].split(",")}
    assert rows == set(range(1, 73))
    outcomes = {line.split("|")[5].split(":")[0].strip() for line in table}
    assert outcomes <= {text for o in OUTCOMES.values() for text in (o.en, o.zh)}


ENGLISH = [path for path in PAGES if not path.name.endswith(".zh.md")]


@pytest.mark.parametrize("path", ENGLISH, ids=lambda path: path.name)
def test_both_languages_have_the_same_commands_figures_and_code(path):
    english = path.read_text("utf-8")
    chinese = path.with_name(f"{path.stem}.zh.md").read_text("utf-8")
    for pattern in (r"^easyllm .*$", r"figures/[\w-]+\.svg", r"\[`(\w+)`\]\(", r"arXiv \d+\.\d+"):
        found = [sorted(set(re.findall(pattern, t, re.MULTILINE))) for t in (english, chinese)]
        assert found[0] == found[1], pattern


def test_figures_are_small():
    sizes = {path.name: path.stat().st_size for path in (MAP / "figures").glob("*.svg")}
    assert {name: size for name, size in sizes.items() if size > 60_000} == {}
