"""Guided generation on the command line: results, and one clear sentence per user error."""

import json

import pytest

from easyllm_command import easyllm
from guide_texts import is_valid

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.fixture
def schema_file(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return path


def test_generate_writes_json_of_a_schema_in_a_file_or_in_the_argument(tiny_folder, schema_file):
    for schema in (schema_file, json.dumps(SCHEMA)):
        done = easyllm("generate", tiny_folder, "x", "--json-schema", schema, "--max-tokens", 60)
        assert done.returncode == 0, done.stderr
        assert is_valid(done.stdout, SCHEMA)


def test_generate_chooses_and_follows_expressions_and_grammars(tiny_folder, tmp_path):
    (tmp_path / "a.lark").write_text('start: "a" /[0-9]{2}/')
    cases = [
        (("--choice", "yes", "--choice", "no"), {"yes", "no"}),
        (("--regex", "a|b"), {"a", "b"}),
        (("--grammar", 'root ::= "x" | "y"'), {"x", "y"}),
        (("--grammar", tmp_path / "a.lark"), {f"a{i:02}" for i in range(100)}),
    ]
    for words, expected in cases:
        done = easyllm("generate", tiny_folder, "x", *words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.removesuffix("\n") in expected
    done = easyllm("chat", tiny_folder, "--choice", "yes", "--max-tokens", 9, stdin="hello\n")
    assert done.stdout == "yes\n", done.stderr


def test_a_text_that_is_cut_is_reported(tiny_folder):
    done = easyllm("generate", tiny_folder, "x", "--regex", "[a-z]{300}", "--max-tokens", 2)
    assert done.returncode == 0
    assert "raise --max-tokens" in done.stderr


def test_a_guide_that_cannot_be_honoured_exits_with_status_2(tiny_folder, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    cases = [
        (("--json-schema", '{"uniqueItems": true}'), "uniqueItems"),
        (("--json-schema", "[]"), "no file"),
        (("--json-schema", ""), "no file"),
        (("--regex", ""), "at least 1 character"),
        (("--json-schema", "{"), "not valid JSON"),
        (("--json-schema", tmp_path / "broken.json"), "not valid JSON"),
        (("--json-schema", tmp_path / "none.json"), "there is no file"),
        (("--json-schema", tmp_path), "there is no file"),
        (("--json-schema", "false"), "no text satisfies"),
        (("--regex", "(?=a)"), "lookahead"),
        (("--regex", "a", "--choice", "b"), "exactly one"),
        (("--regex", "a", "--beams", 2), "leave out --beams or --regex"),
        (("--grammar", "none.lark"), "there is no file"),
        (("--grammar", "start: other"), "unknown name"),
        (("--grammar", "start: <|im_end|>"), "cannot be named"),
    ]
    for words, message in cases:
        done = easyllm("generate", tiny_folder, "x", *words)
        assert done.returncode == 2, (words, done.stderr)
        assert message in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr
