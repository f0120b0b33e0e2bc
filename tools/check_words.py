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
EXEMPT = (".zh.md", "docs/glossary.md", "docs/recipes.md")  # the last lists users' keys


def denied() -> list[tuple[re.Pattern[str], str]]:
    """Each pattern, and what to write in its place."""
    lines = (Path(__file__).with_name("denied_words.txt")).read_text("utf-8").splitlines()
    rules = [line.split(" => ") for line in lines if line and not line.startswith("#")]
    return [(re.compile(pattern, re.IGNORECASE), advice) for pattern, advice in rules]


def found_in(text: str, rules: list[tuple[re.Pattern[str], str]]) -> list[tuple[int, str, str]]:
    """Line number, wording and advice of each hit."""
    hits = []
    for number, line in enumerate(text.splitlines(), start=1):
        for pattern, advice in rules:
            if match := pattern.search(line):
                hits.append((number, match.group(), advice))
    return hits


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
        for number, wording, advice in found_in((root / name).read_text("utf-8"), rules)
    ]


def main() -> int:
    """Prints each hit."""
    hits = hits_in(ROOT)
    sys.stderr.write("".join(f"{hit}\n" for hit in hits))
    return 1 if hits else 0


if __name__ == "__main__":
    sys.exit(main())
