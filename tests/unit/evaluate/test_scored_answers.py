"""Scores of answers, win rates, best-of-n rows, and gold against proxy reward."""

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from easyllm.core.errors import ConfigError, DataError
from easyllm.corpus.files.row import Row
from easyllm.evaluate.best_of_n import best_of_n
from easyllm.evaluate.comparisons import Judged
from easyllm.evaluate.elo import read_games
from easyllm.evaluate.over_optimisation import (
    best_of_n_kl,
    expected_best,
    figure,
    over_optimisation,
)
from easyllm.evaluate.scorers import ScoreComparer, finite, model_scorer, reward_model_scorer
from easyllm.evaluate.win_rate import judged_lines, win_rate
from easyllm.examples.conversations import read_conversation
from easyllm.examples.data_file import read_rows
from easyllm.examples.preferences import preference
from easyllm.models import to_classifier
from fake_judge import answer
from tiny_models import build_tiny


def by_length(answers):
    return [float(len(each.text)) for each in answers]


@pytest.fixture(scope="module")
def scorer(tiny_tokenizer):
    return model_scorer(to_classifier(build_tiny(), 1, seed=1), tiny_tokenizer)


# ---- scores


def test_a_reward_model_scores_each_answer_alone(scorer):
    answers = [answer("It is blue."), answer("no", "How many dogs?"), answer("")]
    together = scorer(answers)
    assert len(set(together)) == 3
    for each, score in zip(answers, together, strict=True):
        assert scorer([each]) == pytest.approx([score], abs=1e-5)


def test_the_score_is_read_at_the_end_of_turn(scorer, tiny_tokenizer):
    model = to_classifier(build_tiny(), 1, seed=1)
    text = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nIt is blue.<|im_end|>"
    ids = torch.tensor(tiny_tokenizer.backend.encode(text, add_special_tokens=False).ids)
    expected = float(model.logits(ids)[-1, 0])
    assert scorer([answer("It is blue.")]) == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused_with_its_answer(bad):
    checked = finite("mine", lambda answers: [1.0, bad])
    with pytest.raises(DataError, match=r"mine gave the score (nan|inf) to the answer 'b' \(here"):
        checked([answer("a"), answer("b")])


def test_a_model_without_one_output_is_refused(tiny_folder):
    with pytest.raises(ConfigError, match="no head for scores, expected one output"):
        reward_model_scorer(str(tiny_folder))


# ---- win rate


def test_a_win_rate_counts_ties_as_half_and_has_a_standard_error():
    ours = [answer("longer"), answer("same"), answer("a"), answer("equal")]
    theirs = [answer("long"), answer("size"), answer("bb"), answer("equal")]
    result = win_rate(ours, theirs, ScoreComparer("length", by_length))
    assert (result.wins, result.ties, result.losses) == (1, 2, 1)
    assert (result.identical, result.unparsed) == (1, 0)
    assert result.win_rate == 0.5
    spread = np.std([1, 0.5, 0, 0.5], ddof=1)
    assert result.standard_error == pytest.approx(spread / 2)
    assert result.mean_tokens == (4.0, 3.75)
    (score,) = result.as_dict()["scores"]
    assert set(score) == {"name", "value", "standard_error", "n", "unparsed", "truncated"}


def test_a_win_rate_of_swapped_sides_is_the_complement():
    draw = random.Random(0)
    ours, theirs = ([answer("x" * draw.randint(1, 9)) for _ in range(20)] for _ in range(2))
    comparer = ScoreComparer("length", by_length)
    one, two = win_rate(ours, theirs, comparer), win_rate(theirs, ours, comparer)
    assert one.win_rate == pytest.approx(1 - two.win_rate)
    assert one.win_rate != 0.5


def test_pairs_without_a_verdict_are_left_out_and_written_as_null(tmp_path):
    class Judge:
        def __init__(self, decisions):
            self.decisions = decisions

        def compare(self, pairs):
            assert len(pairs) == len(self.decisions)
            return self.decisions

    answers = [answer("a"), answer("b")], [answer("c"), answer("d")]
    result = win_rate(*answers, Judge([Judged("second", "B", "A"), Judged(None, None, "A")]))
    assert (result.losses, result.unparsed, result.win_rate) == (1, 1, 0.0)
    path = tmp_path / "judged.jsonl"
    path.write_text(judged_lines(result, "mine", "theirs"))
    (game,) = read_games(read_rows(path))
    assert (game.first, game.second, game.winner) == ("mine", "theirs", "second")
    with pytest.raises(DataError, match="none of the 1 pairs has a parsed verdict"):
        win_rate(
            [answer("b")], [answer("d")], type("J", (), {"compare": lambda _, p: [Judged(None)]})()
        )


# ---- best of n

GROUPS = [
    [answer("bb", "q1"), answer("a", "q1"), answer("cc", "q1")],
    [answer("x", "q2"), answer("y", "q2")],
]


def test_the_best_answers_are_conversations_and_the_first_of_equals_wins():
    result = best_of_n(GROUPS, by_length, form="sft")
    texts = [read_conversation(Row(row, "r")).messages[-1]["content"] for row in result.rows]
    assert texts == ["bb", "x"]
    assert (result.mean_score, result.best_score) == (pytest.approx(7 / 5), 1.5)


def test_best_and_worst_are_pairs_unless_their_scores_are_equal():
    result = best_of_n(GROUPS, by_length, form="pairs")
    (pair,) = [preference(Row(row, "r")) for row in result.rows]
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == ("bb", "a")
    assert pair.prompt == [{"role": "user", "content": "q1"}]
    assert result.equal == 1


def test_earlier_turns_of_the_assistant_are_not_trained():
    first = answer("last")
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    first = replace(first, prompt=replace(first.prompt, messages=messages))
    (row,) = best_of_n([[first]], by_length, form="sft").rows
    assert [m.get("weight") for m in row["messages"]] == [None, 0, None, None]


# ---- over-optimisation


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_expected_values_are_means_over_all_subsets(n):
    draw = np.random.default_rng(n)
    proxy, value = draw.normal(size=(3, 5)), draw.normal(size=(3, 5))
    for row in range(3):
        subsets = list(itertools.combinations(range(5), n))
        chosen = [max(s, key=lambda i: proxy[row, i]) for s in subsets]
        mean = np.mean([value[row, i] for i in chosen])
        assert expected_best(proxy, value, n)[row] == pytest.approx(mean)


def test_equal_proxy_rewards_share_their_probability():
    proxy, value = np.array([[1.0, 2.0, 2.0]]), np.array([[0.0, 1.0, 5.0]])
    assert expected_best(proxy, value, 3) == pytest.approx([3.0])
    assert expected_best(np.zeros((1, 3)), value, 2) == pytest.approx([2.0])


def test_divergence_of_best_of_n():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    # the density of the best of n uniform values is n u^(n-1); its entropy integrated numerically
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (4, 16):
        density = n * u ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx((density * np.log(density)).mean(), abs=1e-4)


def test_a_proxy_that_is_wrong_at_its_top_is_found():
    draw = np.random.default_rng(0)
    proxy = draw.normal(size=(200, 16))
    gold = np.where(proxy < 1, proxy, 1 - 3 * (proxy - 1))  # beyond 1, more is worse
    result = over_optimisation(proxy, gold)
    assert [p.n for p in result.points] == [1, 2, 4, 8, 16]
    assert all(a.proxy < b.proxy for a, b in itertools.pairwise(result.points))
    assert result.peak_n in (2, 4)
    assert result.over_optimised
    assert result.drop == pytest.approx(max(p.gold for p in result.points) - result.points[-1].gold)
    assert not over_optimisation(proxy, proxy).over_optimised
    svg = figure(result)
    assert svg.startswith("<svg")
    assert svg.count("<polyline") == 2
    assert figure(over_optimisation(np.zeros((2, 2)), np.zeros((2, 2)))).endswith("</svg>\n")


def test_one_answer_has_no_curve():
    with pytest.raises(ConfigError, match="at least two answers"):
        over_optimisation([[1.0]], [[1.0]])
