"""Builds the documentation as a folder that opens from `file://`, with `zensical`.

    python tools/site/build_site.py [OUT]      by default build/site

The pages of `docs` are copied and their links to files of the repository replaced: those to code
lead to the API pages, those to other files to copies. Nothing is loaded from the network.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from api_pages import api_pages

ROOT = Path(__file__).resolve().parents[2]
DOCS, SOURCE = ROOT / "docs", ROOT / "src" / "easyllm"
WORKER = Path(__file__).with_name("worker.js")
TARGET = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(((?:\.\./)+[^)\s#]*)(#[^)\s]*)?\)")
SECTIONS = {"map": ("The map", "地图"), "packages": ("Packages", "各个包")}
CONFIG = """[project]
site_name = "Easyllm"
docs_dir = "docs"
site_dir = "site"
use_directory_urls = false
nav = [
{nav}
]

[project.theme]
language = "en"
font = false
features = [
  "content.code.copy", "navigation.indexes", "navigation.footer", "navigation.top",
  "search.highlight", "toc.follow",
]

[project.plugins.search]
[project.plugins.offline]

[project.markdown_extensions]
attr_list = {}
md_in_html = {}
"pymdownx.superfences" = {}
"pymdownx.highlight" = { pygments_lang_class = true }

[project.markdown_extensions.toc]
permalink = true
slugify = { object = "pymdownx.slugs.slugify", kwds = { case = "lower" } }

[project.extra]
generator = false
polyfills = ["javascripts/iframe-worker.js"]
"""


def main() -> int:
    """Builds the site; returns the exit status."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "site").resolve()
    command = shutil.which(
        "zensical", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}"
    )
    if command is None:
        sys.stderr.write("zensical is not installed; run: pip install -e '.[site]'\n")
        return 2
    work = target.with_name(f"{target.name}-work")
    shutil.rmtree(work, ignore_errors=True)
    write_sources(work)
    done = subprocess.run([command, "build", "--clean"], cwd=work, check=False)
    if done.returncode or not (work / "site" / "index.html").is_file():
        sys.stderr.write("zensical could not build the site; see above\n")
        return 1
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(work / "site", target)
    shutil.rmtree(work)
    sys.stdout.write(f"{target / 'index.html'}\n")
    return 0


def write_sources(work: Path) -> None:
    """Writes the pages and the configuration of `zensical` to a new folder."""
    pages = work / "docs"
    shutil.copytree(DOCS, pages)
    for package, text in api_pages(SOURCE).items():
        path = pages / "api" / f"{package}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for path in sorted(pages.rglob("*.md")):
        place = path.relative_to(pages)
        if place.parts[0] != "api":
            path.write_text(localised(path.read_text("utf-8"), place, pages), encoding="utf-8")
    (pages / "javascripts").mkdir()
    shutil.copy(WORKER, pages / "javascripts" / "iframe-worker.js")
    (work / "zensical.toml").write_text(
        CONFIG.replace("{nav}", "\n".join(navigation(pages))), encoding="utf-8"
    )
    tomllib.loads((work / "zensical.toml").read_text(encoding="utf-8"))


def localised(text: str, place: Path, pages: Path) -> str:
    """Returns a page whose links outside `docs` lead to pages of the site.

    Args:
        text: the page.
        place: its path in `docs`.
        pages: the folder of the site's sources, to which files are copied.
    """

    def replaced(match: re.Match[str]) -> str:
        words, link, anchor = match[1], match[2], match[3] or ""
        path = (DOCS / place.parent / link).resolve()
        if path.is_relative_to(DOCS) or not path.is_relative_to(ROOT):
            return match[0]
        if path.is_relative_to(SOURCE):
            target, anchor = code_page(path, words)
        else:
            target = copied(path, pages)
        back = "../" * len(place.parent.parts)
        return f"[{words}]({back}{target}{anchor})"

    return TARGET.sub(replaced, text)


def code_page(path: Path, words: str) -> tuple[str, str]:
    """Returns the API page and the anchor of a module, or of a definition that the link names."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    if not parts:
        return "packages/core.md", ""
    package = parts[0] if len(parts) > 1 or path.is_dir() else "easyllm"
    if path.suffix not in (".py", ""):
        return f"api/{package}.md", ""
    module = ".".join(p for p in parts if p != "__init__")
    if path.is_dir():
        return f"api/{package}.md", f"#{module}" if (path / "__init__.py").is_file() else ""
    name = words.strip("`")
    defined = re.search(rf"^(?:class|def) {re.escape(name)}\b", path.read_text("utf-8"), re.M)
    return f"api/{package}.md", f"#{module}.{name}" if defined else f"#{module}"


def copied(path: Path, pages: Path) -> str:
    """Returns the place of a copy of a file of the repository; of a folder, of a list of files."""
    place = Path("files") / path.relative_to(ROOT)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file())
        lines = [f"- [{p.name}]({p.name})" for p in files if copied(p, pages)]
        place = place / "index.md"
        text = f"# {path.relative_to(ROOT)}\n\n" + "\n".join(lines) + "\n"
        (pages / place).parent.mkdir(parents=True, exist_ok=True)
        (pages / place).write_text(text, encoding="utf-8")
        return str(place)
    (pages / place).parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".md":
        text = re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", path.read_text("utf-8"))
        (pages / place).write_text(text, encoding="utf-8")
    else:
        shutil.copy(path, pages / place)
    return str(place)


def navigation(pages: Path) -> list[str]:
    """Returns the lines of the navigation: guides, map, packages and API, then Chinese pages."""
    english, chinese = list[str](), list[str]()
    for suffix, found in ((".md", english), (".zh.md", chinese)):
        own = sorted(p for p in pages.glob(f"*{suffix}") if _speaks(p, suffix))
        found += [f'    "{p.name}",' for p in own if not p.name.startswith("index.")]
        for folder, titles in SECTIONS.items():
            inside = sorted(p for p in (pages / folder).glob(f"*{suffix}") if _speaks(p, suffix))
            inside.sort(key=lambda p: not p.name.startswith("index."))
            names = ", ".join(f'"{folder}/{p.name}"' for p in inside)
            found.append(f'    {{ "{titles[suffix == ".zh.md"]}" = [{names}] }},')
    api = ", ".join(f'"api/{p.name}"' for p in sorted((pages / "api").glob("*.md")))
    return [
        '  { "Easyllm" = "index.md" },',
        '  { "English" = [',
        *english,
        f'    {{ "API" = [{api}] }},',
        "  ] },",
        '  { "中文" = [',
        '    "index.zh.md",',
        *chinese,
        "  ] },",
    ]


def _speaks(path: Path, suffix: str) -> bool:
    return (suffix == ".zh.md") == path.name.endswith(".zh.md")


if __name__ == "__main__":
    sys.exit(main())
