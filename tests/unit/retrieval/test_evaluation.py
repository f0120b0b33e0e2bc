"""Retrieval metrics and files of questions."""

import json

import numpy as np
import pytest

from easyllm.core.errors import DataError
from easyllm.retrieval.evaluate import contains_any
from easyllm.retrieval.metrics import mean_and_interval, values_by_metric
from easyllm.retrieval.question_files import read_questions


def test_metrics_of_known_ranks():
    means = {name: v.mean() for name, v in values_by_metric([1, 3, 6, None]).items()}
    assert means["recall_at_1"] == 0.25
    assert means["recall_at_5"] == 0.5
    assert means["mrr_at_10"] == pytest.approx((1 + 1 / 3 + 1 / 6) / 4)
    assert means["ndcg_at_10"] == pytest.approx((1 + 1 / 2 + 1 / np.log2(7)) / 4)
    assert values_by_metric([11])["mrr_at_10"].tolist() == [0]


def test_the_interval_has_the_width_of_the_normal_approximation():
    values = np.arange(400) % 2.0
    mean, (low, high) = mean_and_interval(values)
    assert mean == 0.5
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
    assert mean_and_interval(values) == mean_and_interval(values)


def test_answers_are_found_in_any_case_and_width():
    assert contains_any("The  Green ＴＥＡ", ["green tea"])
    assert not contains_any("tea", ["", "coffee"])


def test_squad_and_rows_are_read(tmp_path):
    squad, rows = tmp_path / "a.json", tmp_path / "b.jsonl"
    qas = [{"question": "Q?", "answers": [{"text": "A"}]}]
    paragraphs = [{"context": "A.", "qas": qas}, {"context": "A.", "qas": []}]
    squad.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    found = read_questions(squad)
    assert found.paragraphs == {"paragraph-1": "A."}
    assert found.questions[0].answers == ("A",)
    assert found.questions[0].document == "paragraph-1"
    rows.write_text('{"question": "Q?", "document": "a.md"}\n{"question": "R?", "answer": "x"}\n')
    assert [q.text for q in read_questions(rows).questions] == ["Q?", "R?"]
    assert len(read_questions(rows, limit=1).questions) == 1


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", '{"data": [{}]}', "SQuAD's format"),
        (
            "a.json",
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": null}]}]}]}',
            "question is None, not a text",
        ),
        ("a.json", '{"data": [{"paragraphs": [{"context": 3, "qas": []}]}]}', "context is 3"),
        ("a.json", "[", "is not JSON"),
        ("a.json", '{"data": []}', "contains no question"),
        ("a.jsonl", '{"question": "Q?"}', "neither 'answer' nor 'document'"),
        ("a.jsonl", '{"text": "Q?"}', "no text under 'question'"),
        ("a.jsonl", '{"question": "Q?", "answer": [1]}', "a text or a list"),
        ("a.jsonl", '{"question": "Q?", "answer": 1789}', "has answer 1789, expected a text"),
        ("a.jsonl", '{"question": "Q?", "answer": " "}', "has an empty answer"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=reason):
        read_questions(tmp_path / name)
