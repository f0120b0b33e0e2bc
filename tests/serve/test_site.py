"""The site: links lead to pages that exist, and its search works from files, in Chromium."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "site"))
import build_site as builder  # noqa: E402
from api_pages import api_pages  # noqa: E402

KEPT = ("index.md", "map/index.md", "map/kv-heads.md", "map/deduplication.md")
SEARCH = "[...document.querySelectorAll('*')].find(e => e.shadowRoot).shadowRoot"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The sources of the whole site."""
    work = tmp_path_factory.mktemp("site") / "work"
    builder.write_sources(work)
    return work


@pytest.fixture(scope="module")
def site(sources, tmp_path_factory):
    """A site of a few pages in both languages, and one API page."""
    command = shutil.which("zensical", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("zensical is not installed")
    work = tmp_path_factory.mktemp("small") / "work"
    shutil.copytree(sources, work)
    kept = {*KEPT, *(name.replace(".md", ".zh.md") for name in KEPT), "api/plan.md"}
    for page in (work / "docs").rglob("*.md"):
        if str(page.relative_to(work / "docs")) not in kept:
            page.unlink()
    nav = ",".join(f'"{name}"' for name in sorted(kept))
    text = (work / "zensical.toml").read_text("utf-8")
    text = re.sub(r"nav = \[.*?^\]", lambda _: f"nav = [{nav}]", text, flags=re.DOTALL | re.M)
    (work / "zensical.toml").write_text(text, "utf-8")
    subprocess.run([command, "build"], cwd=work, check=True, capture_output=True)
    return work / "site"


def test_links_of_all_pages_lead_to_pages_anchors_and_files(sources):
    docs, broken = sources / "docs", []
    for page in docs.rglob("*.md"):
        text = re.sub(r"^(```+).*?^\1 *$", "", page.read_text("utf-8"), flags=re.DOTALL | re.M)
        for link in re.findall(r"(?<!`)\]\((?!https?:|#|mailto:)([^)\s]+)\)", text):
            path, _, anchor = unquote(link).partition("#")
            target = (page.parent / path).resolve()
            if not target.exists() or (
                anchor and "api" in target.parts and f'<a id="{anchor}">' not in target.read_text()
            ):
                broken.append((page.name, link))
    assert broken == []


def test_links_to_code_lead_to_its_definition(sources):
    text = (sources / "docs/map/kv-heads.md").read_text("utf-8")
    assert "[`cache_size`](../api/plan.md#plan.kv_cache.cache_size)" in text
    assert "../../src" not in text


def test_api_pages_have_signatures_and_docstrings_of_public_definitions(tmp_path):
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "norm.py").write_text(
        '"""Norms."""\n\n\ndef norm(x: int, *, eps: float = 1e-5) -> int:\n'
        '    """Returns a norm.\n\n    Args:\n        x: [T, D].\n    """\n\n\n'
        'def _hidden(): ...\n\n\nclass Kept:\n    """A value."""\n\n    size: int = 3\n\n'
        '    def twice(self) -> int:\n        """Returns 2."""\n'
    )
    page = api_pages(tmp_path)["ops"]
    assert '<a id="ops.norm.norm"></a>' in page
    assert "def norm(x: int, *, eps: float=1e-05) -> int" in page
    assert "x: [T, D]." in page
    assert "class Kept:\n    size: int" in page
    assert '<a id="ops.norm.Kept.twice"></a>' in page
    assert "_hidden" not in page


def test_nothing_is_loaded_from_the_network(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="([^"]+)"', page.read_text())
        assert [url for url in loaded if url.startswith(("http:", "https:", "//"))] == []


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("heads", "map/kv-heads.html"),
        ("键值头", "map/kv-heads.zh.html"),
        ("近似重复", "map/deduplication.zh.html"),
        ("cache_size", "api/plan.html"),
    ],
)
def test_the_search_finds_english_and_chinese_words_from_files(site, browser, words, page):
    with browser.page((site / "index.html").as_uri()) as tab:
        tab.wait_for("document.querySelector('.md-search__button')")
        tab.evaluate("document.querySelector('.md-search__button').click()")
        tab.wait_for(f"{SEARCH}.querySelector('input')")
        tab.evaluate(
            f"(() => {{ const field = {SEARCH}.querySelector('input');"
            f"field.value = {json.dumps(words)};"
            "field.dispatchEvent(new InputEvent('input', {bubbles: true, composed: true})); })()"
        )
        tab.wait_for(f"{SEARCH}.querySelector('a[href]')")
        links = tab.evaluate(f"[...{SEARCH}.querySelectorAll('a')].map(a => a.href)")
        assert any(page in unquote(link) for link in links), links
        assert tab.errors == []
        assert all(url.startswith(("file:", "data:")) for url in tab.requests)
