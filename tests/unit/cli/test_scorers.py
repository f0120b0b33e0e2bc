"""Scores as commands name them."""

import pytest

from easyllm.cli.scorers import load_scorer
from easyllm.core.errors import ConfigError, DataError
from fake_judge import answer


def test_rules_are_reward_functions_with_options(tmp_path):
    given = [answer("42", answer="42"), answer("It is 41", answer="42")]
    assert load_scorer("rule:exact")(given) == [1.0, 0.0]
    assert load_scorer("rule:exact,take=last_number")(given) == [1.0, 0.0]
    assert load_scorer("rule:digits")(given) == [1.0, 0.25]
    assert load_scorer("rule:length,target=2,scale=3")(given) == [0.0, -2.0]
    own = tmp_path / "own.py"
    own.write_text("def size(answer):\n    return len(answer.text) + answer.row['plus']\n")
    assert load_scorer(f"rule:{own}:size")([answer("ab", plus=1)]) == [3.0]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("rule:exakt", "did you mean 'exact'"),
        ("rule:length,tarqet=1", "has no option 'tarqet'"),
        ("rule:length,target", "write KEY=VALUE"),
        ("length", "give reward:FOLDER or rule:NAME"),
        ("reward:", "give reward:FOLDER or rule:NAME"),
    ],
)
def test_what_is_not_a_score_is_refused(source, said):
    with pytest.raises(ConfigError, match=said):
        load_scorer(source)


def test_a_rule_that_raises_or_returns_nan_quotes_the_answer(tmp_path):
    with pytest.raises(DataError, match=r"rule:exact raised KeyError: 'answer' .*'42' \(here:1\)"):
        load_scorer("rule:exact")([answer("42")])
    own = tmp_path / "own.py"
    own.write_text("def score(answer):\n    return float('nan')\n")
    with pytest.raises(DataError, match="gave the score nan to the answer 'ab'"):
        load_scorer(f"rule:{own}:score")([answer("ab")])
