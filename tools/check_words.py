"""Finds wordings of `denied_words.txt` in the code and the English docs: `python tools/check_words.py`; exit code 1 with each line."""

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


def main() -> int:
    """Prints each hit as `FILE:LINE: "wording": write ...`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FILES]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rules, count = denied(), 0
    for name in names.splitlines():
        if name.endswith(EXEMPT):
            continue
        for number, wording, advice in found_in((ROOT / name).read_text("utf-8"), rules):
            sys.stderr.write(f'{name}:{number}: "{wording}": write {advice}\n')
            count += 1
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
