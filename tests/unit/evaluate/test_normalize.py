"""Normal forms of answers: signs, points, full-width characters, Chinese."""

import pytest

from easyllm.evaluate.metric import Outcome
from easyllm.evaluate.text_metrics import text_metrics


@pytest.mark.parametrize(
    ("answer", "right", "exact", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1),
        ("-5", "5", 0, 0),
        ("3.5", "35", 0, 0),
        ("1,000", "1000", 1, 1),
        ("３．５％", "3.5%", 1, 1),
        ("“北京”。", "北京", 1, 1),
        ("北京 2024", "上海 2024", 0, 2 * 1 / 6),
        ("在北京市", "北京", 0, 2 * 2 / 6),
        ("well-known", "well known", 1, 1),
        ("", "x", 0, 0),
    ],
)
def test_exact_match_and_f1(answer, right, exact, f1):
    metrics = text_metrics()
    outcome = Outcome(answer=answer, references=(right,))
    assert metrics["exact_match"].statistics(outcome)[0] == exact
    assert metrics["f1"].statistics(outcome)[0] == pytest.approx(f1)


def test_the_best_reference_counts_and_an_unparsed_answer_is_wrong():
    metric = text_metrics()["exact_match"]
    assert metric.statistics(Outcome(answer="b", references=("a", "b")))[0] == 1
    assert metric.statistics(Outcome(answer=None, references=("",)))[0] == 0
