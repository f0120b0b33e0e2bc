"""`docs/cli.md` and `docs/recipes.md` are made from the commands and the configuration fields."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from easyllm.cli.schema import SCHEMAS, schema_of

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "reference_docs.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("reference_docs", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date():
    # in a new process: other tests register further kinds
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stale_page_is_reported_with_its_first_line(tool, tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    assert tool.main(["--check"]) == 1
    assert "docs/cli.md:1 is stale" in capsys.readouterr().out
    assert tool.main([]) == 0
    assert tool.main(["--check"]) == 0
    page = tmp_path / "docs" / "recipes.md"
    page.write_text(page.read_text() + "more\n")
    number = len(page.read_text().splitlines())
    assert tool.main(["--check"]) == 1
    assert capsys.readouterr().out.startswith(f"docs/recipes.md:{number} is stale")


def test_every_key_is_in_the_page_and_every_link_has_a_section(tool):
    page = tool.recipes_page()
    headings = {tool.anchor(line.lstrip("# ")) for line in page.splitlines() if line[:1] == "#"}
    links = set(re.findall(r"\]\(#([^)]*)\)", page))
    assert links <= headings
    for name in SCHEMAS:
        for key in schema_of(name)["properties"]:
            assert f"| `{key}` |" in page
    for model in schema_of("run")["$defs"]:
        assert f"### {model}\n" in page


def test_every_command_is_in_the_page_with_usage_and_examples(tool):
    page = tool.cli_page()
    sections = page.split("\n## ")[1:]
    assert len(sections) == len(list(tool.commands(tool.app)))
    for section in sections:
        name = section.partition("\n")[0]
        assert f"```\n{name}" in section
        assert f"```sh\n{name}" in section or "|" in section.partition("```sh")[2], name


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 9}, "integer from 1 to 9"),
        ({"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "integer ≥ 0"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "number ≤ 1, > 0"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text or null"),
        ({"type": "array", "items": {"enum": ["a", "b"]}}, "list of `a` or `b`"),
        ({"type": "object", "additionalProperties": {"$ref": "#/$defs/A"}}, "mapping to [A](#a)"),
        ({"allOf": [{"$ref": "#/$defs/A"}], "required": ["kind"]}, "[A](#a)"),
        ({"$ref": "#/$defs/B"}, "[b](#b)"),
        ({}, "any value"),
    ],
)
def test_types_are_written_in_words(tool, schema, text):
    models = {"A": {"properties": {}}, "B": {"properties": {"kind": {"const": "b"}}}}
    assert tool.type_of(schema, models) == text
