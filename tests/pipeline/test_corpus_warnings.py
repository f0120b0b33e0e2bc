"""`easyllm data build` warns if a rule, a key or a language removes most of a source.

It fails if no documents remain.
"""

import json

import pytest
from typer.testing import CliRunner

from easyllm.cli.main import app
from easyllm.core.errors import DataError
from easyllm.corpus.report import SourceCounts
from easyllm.corpus.warnings import warnings

NOUNS = list("桥河山城村湖路塔寺园井坊街港岛田林谷峰湾")


def page(number):
    """Returns a clean Chinese paragraph in one line, different for each number."""
    a, b, c = (NOUNS[number * k % len(NOUNS)] for k in (1, 3, 7))
    return (
        f"第{number}号{a}的旁边有一座很老的{b}，当地人说它已经有{number + 200}年的历史了。"
        f"每到春天，人们就会从{c}的另一边走过来，"
        "在这里买东西、喝茶、聊天，一直到太阳下山才回家。后来政府把它修好了，"
        "但是样子和以前没有什么不同。"
    )


def english(number):
    return (
        f"House number {number} stands at the end of the road, and people say that it is "
        "haunted by a cat. "
        "Every spring they walk over the hill to have a look at it, and none of them has "
        "ever seen the animal. "
        f"After {number + 3} years the owner painted the door, but that did not bring the "
        "visitors to an end."
    )


@pytest.fixture
def build(tmp_path, tiny_folder):
    """Runs the command on texts, or rows, with the built-in Chinese recipe."""

    def run(rows, *words):
        rows = [row if isinstance(row, dict) else {"text": row} for row in rows]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / "pages.jsonl").write_text(lines)
        arguments = [f"sources.web.paths=[{tmp_path / 'pages.jsonl'}]", f"tokenizer={tiny_folder}"]
        arguments += [f"output={tmp_path / 'out'}", "workers=1", *words]
        return CliRunner().invoke(app, ["data", "build", "data-zh", *arguments])

    return run


@pytest.mark.parametrize("preset", ["fineweb-zh", "gopher-zh"])
def test_clean_chinese_pages_in_one_line_are_kept(build, preset):
    done = build([page(n) for n in range(30)], f"clean.preset={preset}", "dedup=null", "--json")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["documents_kept"] == 30
    assert summary["warnings"] == []


def test_the_matching_preset_is_suggested_if_nothing_is_left(build, tmp_path):
    error = build([page(n) for n in range(30)], "clean.preset=gopher").exception
    assert isinstance(error, DataError)
    assert error.exit_code == 2
    assert str(error) == (
        "no documents remain (language.code 30); 30 are in Chinese: "
        "use clean.preset=fineweb-zh or gopher-zh"
    )
    assert not (tmp_path / "out").exists()


def test_an_almost_empty_result_is_warned_about(build, tmp_path):
    rows = [page(n) for n in range(60)] + [english(n) for n in range(2)]
    done = build(rows, "clean.preset=gopher", "dedup=null", "--json")
    assert done.exit_code == 0
    told = json.loads(done.stdout)["warnings"]
    assert told == [
        "only 2 of 62 documents remain (3.2%): this is probably not the intended corpus",
        "rule language.code removed 60 of the 62 documents of source 'web' (97%); 60 are in "
        "Chinese: use clean.preset=fineweb-zh or gopher-zh, or give the source its own rules "
        "(sources.web.clean)",
    ]
    for line in told:
        assert f"warning: {line}" in done.stderr
        assert line in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("rows", "words", "told"),
    [
        (
            [page(n) for n in range(20)] + [page(n)[:36] for n in range(30)],
            ["dedup=null"],
            "rule gopher_quality.words removed 30 of the 50 documents of source 'web' (60%); "
            "loosen the rules "
            "(clean.override.gopher_quality)",
        ),
        (
            [page(1)] * 30 + [page(n) for n in range(5)],
            [],
            "rule exact removed 30 of the 35 documents of source 'web' (86%); they are duplicates",
        ),
        (
            [page(n) for n in range(9)] + [english(n) for n in range(11)],
            ["dedup=null"],
            "rule language.code removed 11 of the 20 documents of source 'web' (55%); 11 are in "
            "'en': allow it",
        ),
        (
            [page(n) for n in range(9)] + [{"body": page(n)} for n in range(11)],
            ["dedup=null"],
            "11 of the 20 rows of source 'web' could not be read (no key 'text': 11); set text_key",
        ),
    ],
)
def test_the_main_cause_of_a_loss_is_named(build, rows, words, told):
    done = build(rows, *words, "--json")
    assert done.exit_code == 0, done.output
    assert any(line.startswith(told) for line in json.loads(done.stdout)["warnings"])


@pytest.mark.parametrize(
    ("rows", "words", "reason"),
    [
        (
            [{"text": "x"}] * 3,
            ["sources.web.text_key=body"],
            "no documents remain (pages.jsonl:1: no key 'body' (keys: text), and 2 more rows); "
            "set text_key to the key that contains the text",
        ),
        (
            [{"text": 3}],
            [],
            "'text' is of type int); set text_key to the key that contains the text",
        ),
        ([], [], "no documents remain (the sources contain none); check their paths"),
    ],
)
def test_the_real_cause_is_reported_if_no_row_can_be_read(build, rows, words, reason):
    error = build(rows, *words).exception
    assert isinstance(error, DataError)
    assert reason in str(error)


def fate(read, removed, bad_rows=0):
    return SourceCounts(
        read=read,
        kept=read - sum(removed.values()),
        removed=removed,
        bad_rows={"not JSON": bad_rows} if bad_rows else {},
        languages={},
    )


def test_few_documents_and_moderate_losses_give_no_warning():
    assert warnings({"web": fate(100, {"exact": 40}, bad_rows=3)}) == []
    assert warnings({"web": fate(4, {"exact": 3}, bad_rows=3)}) == []


def test_several_rules_that_leave_little_together_are_named():
    removed = {
        "length.words": 30,
        "exact": 5,
        "gopher_quality.words": 41,
        "c4_quality.sentences": 24,
    }
    (line,) = warnings({"web": fate(120, removed)})
    assert line == (
        "only 20 of the 120 documents of source 'web' were kept (17%); the rules that removed "
        "most are gopher_quality.words 41 (34%), length.words 30 (25%), c4_quality.sentences 24 "
        "(20%): loosen the rules (clean.override.gopher_quality) or check the source, or give the "
        "source its own rules (sources.web.clean)"
    )
    (line,) = warnings({"web": fate(30, {"exact": 11, "fuzzy": 10})})
    assert line.startswith(
        "only 9 of the 30 documents of source 'web' were kept (30%); "
        "the rules that removed most are exact 11"
    )


@pytest.mark.parametrize(
    ("read", "removed", "expected"),
    [
        (120, {"a.b": 40, "c.d": 40}, 0),  # a third is kept
        (9, {"a.b": 4, "c.d": 4}, 0),  # too few documents for percentages
        (120, {"a.b": 61, "c.d": 40}, 1),  # one rule removed most: only it is named
    ],
)
def test_combined_losses_are_reported_only_if_no_single_rule_dominates(read, removed, expected):
    lines = warnings({"web": fate(read, removed)})
    assert len(lines) == expected
    assert not any("removed most" in line for line in lines)
