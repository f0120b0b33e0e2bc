"""The docs: every link resolves, every topic has a page and a source, standard terms are used."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted(DOCS.rglob("*.md"))]
OTHER_PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "findings/README.md")]
UNTRANSLATED = ("glossary.md", "decisions.md", "cli.md", "recipes.md")  # one has both languages
TERMS = [
    *("batch-invariant", "zero point", "prefix caching", "continuous batching", "preemption"),
    *("gradient checkpointing", "gradient accumulation", "gradient clipping", "weight decay"),
    *("sequence packing", "cu_seqlens", "chunked prefill", "paged attention", "copy-on-write"),
    *("speculative decoding", "draft tokens", "sliding window", "attention sink", "KV cache"),
    *("RoPE", "YaRN", "NTK", "ALiBi", "grouped-query attention", "mixture of experts"),
    *("load-balancing loss", "tied embeddings", "residual stream", "RMSNorm", "SwiGLU"),
    *("LoRA", "rank", "warm-up", "loss mask", "chat template", "byte-level BPE", "MinHash"),
    *("decontamination", "perplexity", "bits per byte", "MFU", "dequantize", "group size"),
    *("VNNI", "beam search", "top-p", "GEMM", "near-duplicate", "learning-rate schedule"),
]
LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.*?) *#*$", flags=re.MULTILINE)


def without_code(text: str) -> str:
    """Returns a page without its code blocks and code spans, whose brackets are not links."""
    text = re.sub(r"^(```+).*?^\1 *$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def slug(heading: str) -> str:
    """Returns the anchor that GitHub gives a heading."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")


@cache
def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page; a repeated heading's are numbered."""
    blocks = r"^(```+).*?^\1 *$"
    text = re.sub(blocks, "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: dict[str, int] = {}
    names = set()
    for heading in HEADING.findall(text):
        name = slug(heading)
        names.add(name if name not in found else f"{name}-{found[name]}")
        found[name] = found.get(name, 0) + 1
    return names


def broken(page: Path) -> list[str]:
    """Returns the relative links of a page that lead nowhere."""
    bad = []
    for link in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target)
        ):
            bad.append(link)
    return bad


@pytest.mark.parametrize(
    "page", [*PAGES, *OTHER_PAGES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_relative_link_and_anchor_resolves(page):
    assert not broken(page)


def test_a_broken_link_and_a_broken_anchor_are_found(tmp_path):
    (tmp_path / "b.md").write_text("# One: `two` & three\n\n```\n# no heading\n```\n")
    page = tmp_path / "a.md"
    page.write_text("[](b.md#one-two--three) [](b.md#no-heading) [](c.md) `[](d.md)` [](https://e)")
    assert broken(page) == ["b.md#no-heading", "c.md"]


@pytest.mark.parametrize("term", TERMS)
def test_a_standard_term_is_used_outside_the_glossary(term):
    word = re.compile(rf"(?<!\w){re.escape(term)}", flags=re.IGNORECASE)
    pages = [p for p in english_pages() if p.name != "glossary.md"]
    assert any(word.search(page.read_text(encoding="utf-8")) for page in pages)


def english_pages() -> list[Path]:
    return [page for page in sorted(DOCS.rglob("*.md")) if not page.name.endswith(".zh.md")]


def topic_rows() -> list[str]:
    """Returns the rows of the tables under the heading "Topics" of the map of the docs."""
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    section = text.split("\n## Topics\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    return [row for row in rows if not row.startswith(("| --- ", "| topic "))]


def test_every_topic_links_to_a_page_and_to_at_most_two_places_of_the_source():
    assert len(topic_rows()) > 50
    for row in topic_rows():
        _, page, source = row.strip("| ").split(" | ")
        assert re.search(r"\]\((?!\.\.)[\w/.-]+\.md(#[^)]*)?\)", page), row
        assert 1 <= len(re.findall(r"\]\(\.\./src/easyllm/", source)) <= 2, row


def test_every_package_has_a_page_that_the_map_links():
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    folders = {p.parent.name for p in (ROOT / "src" / "easyllm").glob("*/__init__.py")}
    pages = {page.stem for page in (DOCS / "packages").glob("*.md") if "." not in page.stem}
    assert folders <= pages
    assert all(f"(packages/{name}.md)" in text for name in pages)


def test_the_readme_is_short_and_links_the_map():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    assert "(docs/index.md)" in text


def test_every_page_has_a_chinese_twin():
    pages = [page for page in english_pages() if page.name not in UNTRANSLATED]
    missing = [page for page in pages if not page.with_suffix(".zh.md").exists()]
    assert not [str(page.relative_to(ROOT)) for page in missing]


def without_english_page(folder: Path) -> list[str]:
    """Returns the Chinese pages in a folder that translate no English page."""
    pages = sorted(folder.rglob("*.zh.md"))
    ends = [(page, page.with_name(f"{page.name.removesuffix('.zh.md')}.md")) for page in pages]
    return [page.relative_to(folder).as_posix() for page, english in ends if not english.is_file()]


def test_every_chinese_page_has_an_english_one(tmp_path):
    assert without_english_page(DOCS) == []
    (tmp_path / "a.md").touch()
    (tmp_path / "a.zh.md").touch()
    (tmp_path / "b.zh.md").touch()
    assert without_english_page(tmp_path) == ["b.zh.md"]


def twins() -> list[tuple[Path, Path]]:
    """Returns each English page with its Chinese twin."""
    pages = [(page, page.with_suffix(".zh.md")) for page in english_pages()]
    pairs = [(page, twin) for page, twin in pages if page.name not in UNTRANSLATED]
    return [(ROOT / "README.md", ROOT / "README.zh-CN.md"), *pairs]


def code_lines(page: Path, *languages: str) -> list[str]:
    """Returns the lines of a page's code blocks in some languages, without comments."""
    blocks = re.findall(
        r"^```(\w+).*?\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    text = "".join(code for language, code in blocks if language in languages)
    lines = (re.sub(r"(^|\s+)#\s.*", "", line).rstrip() for line in text.splitlines())
    return [line for line in lines if line]


@pytest.mark.parametrize(("page", "twin"), twins(), ids=[page.stem for page, _ in twins()])
def test_a_page_and_its_chinese_twin_have_the_same_code(page, twin):
    languages = ("bash", "python", "yaml", "json")
    assert code_lines(page, *languages) == code_lines(twin, *languages)


@pytest.mark.parametrize(("page", "twin"), twins(), ids=[page.stem for page, _ in twins()])
def test_a_page_and_its_chinese_twin_have_as_many_links_to_headings(page, twin):
    texts = [without_code(path.read_text(encoding="utf-8")) for path in (page, twin)]
    english, chinese = ([link for link in LINK.findall(text) if "#" in link] for text in texts)
    assert len(chinese) == len(english)


def commands() -> list[str]:
    """Returns the easyllm commands of all pages and of the comments of the shipped recipes."""
    pages = [*PAGES, ROOT / "CONTRIBUTING.md"]
    found = [line for page in pages for line in code_lines(page, "bash", "sh")]
    spans = [re.findall(r"`(easyllm [^`]+)`", page.read_text("utf-8")) for page in pages]
    recipes = [path.read_text("utf-8") for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    comments = [re.findall(r"^# +(.*=.*)$", text, re.MULTILINE) for text in recipes]
    return [*found, *(line for lines in (*spans, *comments) for line in lines)]


def test_words_that_a_shell_would_interpret_are_quoted():
    bare = re.compile(r"[\w.]+=[^\s'\"]*[\[{*]")
    assert len(commands()) > 100
    assert [line for line in commands() if bare.search(re.sub(r"'[^']*'", "''", line))] == []


def test_the_pages_say_how_to_activate_the_environment():
    assert "source $(BIN)/activate" in (ROOT / "Makefile").read_text("utf-8")
    for name in ("README.md", "README.zh-CN.md"):
        assert "source .venv/bin/activate" in code_lines(ROOT / name, "bash")


def test_docs_and_readme_use_no_denied_wording():
    command = [sys.executable, "tools/check_words.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    hits = [line for line in done.stderr.splitlines() if line.startswith(("docs/", "README"))]
    assert not hits
