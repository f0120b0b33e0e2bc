"""Elo ratings: the closed form of two models, a simulation, invariance, and what is refused."""

import math
import random

import numpy as np
import pytest

from easyllm.core.errors import DataError
from easyllm.corpus.files.row import Row
from easyllm.evaluate.elo import Game, elo_table, read_games


def games_of(first, second, won, lost, tied=0):
    winners = ["first"] * won + ["second"] * lost + ["tie"] * tied
    return [Game(first, second, winner, f"p{i}") for i, winner in enumerate(winners)]


@pytest.mark.parametrize(("won", "lost", "tied"), [(3, 1, 0), (7, 2, 5), (1, 1, 0), (0, 0, 4)])
def test_two_models_have_the_closed_form(won, lost, tied):
    a, b = sorted(elo_table(games_of("a", "b", won, lost, tied)), key=lambda r: r.model)
    odds = (won + tied / 2) / (lost + tied / 2)
    assert a.elo - b.elo == pytest.approx(400 * math.log10(odds), abs=1e-6)
    assert a.elo + b.elo == pytest.approx(2000)
    assert a.win_rate == pytest.approx((won + tied / 2) / (won + lost + tied))
    assert a.games == b.games == won + lost + tied


def test_a_simulation_is_recovered_within_the_intervals():
    true = {"m0": 800.0, "m1": 950.0, "m2": 1000.0, "m3": 1250.0}
    draw = random.Random(1)
    games = []
    for prompt in range(600):
        first, second = draw.sample(sorted(true), 2)
        chance = 1 / (1 + 10 ** ((true[second] - true[first]) / 400))
        winner = "first" if draw.random() < chance else "second"
        games.append(Game(first, second, winner, str(prompt)))
    table = elo_table(games, replicates=200, seed=3)
    assert [rating.model for rating in table] == ["m3", "m2", "m1", "m0"]
    for rating in table:
        assert rating.low < rating.elo < rating.high
        assert rating.low - 20 <= true[rating.model] <= rating.high + 20
        assert 30 < rating.high - rating.low < 200


def test_intervals_have_the_width_of_the_normal_approximation():
    a = next(r for r in elo_table(games_of("a", "b", 60, 40), replicates=2000) if r.model == "a")
    # the standard error of a log-odds is 1 / sqrt(n p (1 - p)); one model has half the difference
    error = 400 / math.log(10) / math.sqrt(100 * 0.6 * 0.4) / 2
    assert a.high - a.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_the_order_of_the_games_changes_no_bit():
    games = [*games_of("a", "b", 5, 3), *games_of("b", "c", 4, 4, 1), *games_of("c", "a", 2, 3)]
    shuffled = games[:]
    random.Random(0).shuffle(shuffled)
    assert shuffled != games
    assert elo_table(shuffled, replicates=50) == elo_table(games, replicates=50)


def test_swapping_the_sides_of_every_game_changes_nothing():
    games = [*games_of("a", "b", 5, 3), *games_of("b", "c", 4, 4, 1)]
    other = {"first": "second", "second": "first", "tie": "tie"}
    swapped = [Game(g.second, g.first, other[g.winner], g.prompt) for g in games]
    for one, two in zip(elo_table(games), elo_table(swapped), strict=True):
        assert one.model == two.model
        assert one.elo == pytest.approx(two.elo, abs=1e-6)


def test_games_about_one_prompt_are_resampled_together():
    ten = [Game("a", "b", w, str(i)) for i, w in enumerate(["first"] * 6 + ["second"] * 4)]
    # the same ten prompts, each judged nine times with the same outcome: no more information
    repeated = [game for game in ten for _ in range(9)]
    once, often = elo_table(ten, seed=5), elo_table(repeated, seed=5)
    np.testing.assert_allclose([r.low for r in once], [r.low for r in often], atol=1e-6)


def test_an_undefeated_model_is_refused_unless_ties_are_added():
    games = games_of("a", "b", 4, 0)
    with pytest.raises(DataError, match="'a' is infinite: no pair was lost by it"):
        elo_table(games)
    table = elo_table(games, prior_ties=1)
    assert table[0].elo - table[1].elo == pytest.approx(400 * math.log10(4.5 / 0.5))


def test_models_that_never_met_are_refused():
    games = [*games_of("a", "b", 1, 1), *games_of("c", "d", 1, 1)]
    with pytest.raises(DataError, match="'a' and 'c' are not connected"):
        elo_table(games)
    with pytest.raises(DataError, match="with itself"):
        elo_table([Game("a", "a", "tie")])


def test_rows_are_read_and_pairs_without_a_verdict_are_left_out():
    rows = [
        {"prompt": "p", "a": "x", "b": "y", "winner": "b"},
        {"a": "x", "b": "y", "winner": None},
    ]
    assert read_games(Row(values, "here") for values in rows) == [Game("x", "y", "second", "p")]
    for bad in ({"a": "x", "b": "y"}, {"a": "x", "b": 1, "winner": "a"}, {"winner": "c"}):
        with pytest.raises(DataError, match="here is not a judged pair"):
            read_games([Row(bad, "here")])
