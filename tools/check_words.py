"""Finds wordings of `denied_words.txt` in code and English docs, and exits with 1 if there are any.

python tools/check_words.py
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What is searched: git's patterns. Chinese pages and the list of terms are not.
FILES = ("src/*.py", "src/*.c", "src/*.h", "docs/*.md", "recipes/*.yaml", "README.md")
FILES += ("CONTRIBUTING.md", "CHANGELOG.md", "bench/*.py", "Makefile", "findings/*")
FILES += ("pyproject.toml", "src/*.html")
MARGIN = re.compile(r"^(?:(?:#+|//+|/\*|\*+|>|-|f?[\"'])\s*)+")
END = re.compile(r"\s*(?:\s*[\"'],?|\\)?$")
EXEMPT = (".zh.md", "docs/glossary.md", "docs/recipes.md")  # the last lists users' keys


def denied() -> list[tuple[re.Pattern[str], str]]:
    """Each pattern, and what to write in its place."""
    lines = (Path(__file__).with_name("denied_words.txt")).read_text("utf-8").splitlines()
    rules = [line.split(" => ") for line in lines if line and not line.startswith("#")]
    return [(re.compile(pattern, re.IGNORECASE), advice) for pattern, advice in rules]


def found_in(text: str, rules: list[tuple[re.Pattern[str], str]]) -> list[tuple[int, str, str]]:
    """Line number, wording and advice of each hit, of the first one of a rule in a line.

    A wording may be split over two lines, whose margins (`#`, `//`, `*`, `>`, quotes of a string)
    do not count, and spaces may be doubled.
    """
    lines = [" ".join(line.split()) for line in text.splitlines()]
    some = re.compile("|".join(f"(?:{pattern.pattern})" for pattern, _ in rules), re.IGNORECASE)
    hits = []
    for number, line in enumerate(lines, start=1):
        following = MARGIN.sub("", lines[number]) if number < len(lines) else ""
        joined = f"{END.sub('', line)} {following}" if following else line
        if some.search(line) is None and some.search(joined) is None:
            continue  # the usual case, in two searches
        for pattern, advice in rules:
            match = pattern.search(line) or _across(pattern, joined, len(END.sub("", line)))
            if match is not None:
                hits.append((number, match.group(), advice))
    return hits


def _across(pattern: re.Pattern[str], text: str, border: int) -> re.Match[str] | None:
    """The first match that begins before a border in a text and ends after it."""
    crossing = (m for m in pattern.finditer(text) if m.start() < border < m.end() - 1)
    return next(crossing, None)


def visible(name: str, text: str) -> str:
    """The text of a file that people read, with its line breaks.

    Of HTML, the text outside tags, scripts and styles and the texts of a script's strings; of
    pyproject.toml, the description.
    """
    if name.endswith("pyproject.toml"):
        return re.sub(r"^(?!description = ).*$", "", text, flags=re.MULTILINE)
    if not name.endswith(".html"):
        return text

    def strings(script: re.Match[str]) -> str:
        found = re.sub(r"^[ \t]*//.*$", "", script[2], flags=re.MULTILINE)
        code = re.split(r"(\"[^\"\n]*\"|'[^'\n]*'|`[^`]*`)", found)
        return "".join(
            part if n % 2 else re.sub(r"[^\n]+", " ", part) for n, part in enumerate(code)
        )

    text = re.sub(r"<!--.*?-->|<style.*?</style>", _blank, text, flags=re.DOTALL)
    text = re.sub(r"(<script[^>]*>)(.*?)</script>", strings, text, flags=re.DOTALL)
    return re.sub(r"<[a-zA-Z/][^>]*>", _attributes, text, flags=re.DOTALL)


def _blank(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")


def _attributes(tag: re.Match[str]) -> str:
    """The texts of a tag that are shown: those of `title`, `placeholder`, `alt`, `aria-label`."""
    shown = re.findall(r'(?:title|placeholder|alt|aria-label)="([^"]*)"', tag[0])
    return f" {' '.join(shown)} " + _blank(tag)


def hits_in(root: Path, patterns: tuple[str, ...] = FILES) -> list[str]:
    """`FILE:LINE: "wording": write ...` for each hit in the files of a git work tree.

    Args:
        root: the work tree; ignored files are left out.
        patterns: git's patterns of the files.
    """
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    rules = denied()
    return [
        f'{name}:{number}: "{wording}": write {advice}'
        for name in names.splitlines()
        if not name.endswith(EXEMPT) and (root / name).is_file()
        for number, wording, advice in found_in(
            visible(name, (root / name).read_text("utf-8")), rules
        )
    ]


def main() -> int:
    """Prints each hit."""
    hits = hits_in(ROOT)
    sys.stderr.write("".join(f"{hit}\n" for hit in hits))
    return 1 if hits else 0


if __name__ == "__main__":
    sys.exit(main())
