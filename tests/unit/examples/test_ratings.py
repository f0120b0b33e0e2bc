"""Responses with a numeric score."""

import json

import pytest

from easyllm.core.errors import DataError
from easyllm.examples.ratings import prepare_ratings, read_ratings


def file_of(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_any_conversation_format_may_have_a_score(tmp_path):
    chat = [{"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"))]
    rows = [
        {"prompt": "q", "completion": "a", "score": 4},
        {"messages": chat, "score": -0.5},
        {"instruction": "q", "output": "a", "score": 0},
    ]
    found = list(read_ratings(file_of(tmp_path, *rows)))
    assert [rated.score for rated in found] == [4.0, -0.5, 0.0]
    assert {json.dumps([rated.prompt, rated.response]) for rated in found} == {
        json.dumps([chat[:1], chat[1:]])
    }
    assert found[1].format == "messages-score"


def test_another_key_may_hold_the_score(tmp_path, tiny_tokenizer):
    path = file_of(tmp_path, {"prompt": "q", "completion": "a", "quality": 2})
    ((encoded, score),), account = prepare_ratings(
        read_ratings(path, score_key="quality"), tiny_tokenizer, max_seq_len=64
    )
    assert score == 2.0
    assert account.trained_tokens == sum(encoded.mask) > 0


@pytest.mark.parametrize("score", [None, "4", True, float("nan")])
def test_a_score_that_is_not_a_finite_number_is_refused(tmp_path, score):
    row = {"prompt": "q", "completion": "a", "score": score}
    with pytest.raises(DataError, match=r"rows\.jsonl:1 has score .*; set data\.score_key"):
        list(read_ratings(file_of(tmp_path, row)))


def test_a_pair_is_refused_with_the_kind_that_reads_it(tmp_path):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "score": 1}
    with pytest.raises(DataError, match=r"data\.kind=preferences"):
        list(read_ratings(file_of(tmp_path, pair)))
