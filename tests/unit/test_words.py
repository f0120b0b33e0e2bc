"""The check of wordings names file and line of each hit; the project itself has none."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ("docs/*.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")


@pytest.fixture(scope="module")
def check_words():
    spec = importlib.util.spec_from_file_location("check_words", ROOT / "tools" / "check_words.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    """A git work tree with denied wordings in a Python, a C and a Markdown file."""
    files = {
        "src/package/loop.py": '"""Trains."""\n\n# one token behind the other\n',
        "src/package/kernel.c": "// rows are laced\nint x;\n",
        "docs/train.md": "# Training\n\nIt goes on.\n\nThe loss is no number.\n",
        "docs/train.zh.md": "behind\n",
        "docs/glossary.md": "behind\n",
        "ignored/src/a.py": "# behind\n",
        ".gitignore": "/ignored/\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    return tmp_path


def test_a_denied_wording_is_named_with_file_and_line(check_words, tree):
    hits = check_words.hits_in(tree)
    places = [hit.split(": write ")[0] for hit in hits]
    assert sorted(set(places)) == [
        'docs/train.md:3: "goes on"',
        'docs/train.md:5: "is no number"',
        'docs/train.md:5: "no number"',
        'src/package/kernel.c:1: "laced"',
        'src/package/loop.py:3: "behind"',
    ]
    assert all(": write " in hit for hit in hits)


def test_the_command_fails_if_there_are_hits_and_only_then(check_words, tree, monkeypatch, capsys):
    monkeypatch.setattr(check_words, "ROOT", tree)
    assert check_words.main() == 1
    assert "src/package/loop.py:3" in capsys.readouterr().err
    for path in ("docs/train.md", "src/package/loop.py", "src/package/kernel.c"):
        (tree / path).write_text("interleaved; placed; it is longer\n", encoding="utf-8")
    assert check_words.main() == 0
    assert capsys.readouterr().err == ""


def test_every_denied_wording_has_advice(check_words):
    rules = check_words.denied()
    assert len(rules) > 10
    assert all(advice.strip() for _, advice in rules)


def test_the_code_contains_no_denied_wording(check_words):
    others = tuple(pattern for pattern in check_words.FILES if pattern not in DOCS)
    assert check_words.hits_in(ROOT, others) == []


def test_the_docs_contain_no_denied_wording(check_words):
    assert check_words.hits_in(ROOT, DOCS) == []


SPLIT = {
    "two lines": ("It goes\non.\n", 1),
    "two lines of a comment": ("x = 1  # it goes\n    # on and ends\n", 1),
    "two lines of a string": ('f(\n    "it goes "\n    "on")\n', 2),
    "two lines of C": ("// it goes\n// on\n", 1),
    "doubled spaces": ("It goes  on.\n", 1),
    "a tab": ("It goes\ton.\n", 1),
}


@pytest.mark.parametrize(("text", "line"), SPLIT.values(), ids=SPLIT.keys())
def test_a_wording_may_be_split(check_words, text, line):
    hits = check_words.found_in(text, check_words.denied())
    assert [number for number, *_ in hits] == [line]


def test_lines_that_do_not_continue_are_not_joined(check_words):
    assert check_words.found_in("It goes\n\non.\n", check_words.denied()) == []


def test_of_a_page_only_the_visible_text_is_searched(check_words):
    page = (
        "<style>\n.behind {}\n</style>\n<p class='behind'>Behind.</p><!-- behind -->\n"
        '<a title="it goes on">x</a>\n<script>\nconst behind = "Goes on."; // behind\n</script>\n'
    )
    hits = check_words.found_in(check_words.visible("a.html", page), check_words.denied())
    assert [(number, wording) for number, wording, _ in hits] == [
        (4, "Behind"),
        (5, "goes on"),
        (7, "Goes on"),
    ]
    text = 'name = "behind"\ndescription = "What lies behind"\n'
    hits = check_words.found_in(check_words.visible("pyproject.toml", text), check_words.denied())
    assert {number for number, *_ in hits} == {2}
