"""Elo ratings of several models from judged pairs, with bootstrap intervals.

    P(i beats j) = σ(θ_i - θ_j)          Elo_i = 1000 + 400 / ln 10 · (θ_i - mean θ)

θ maximizes the likelihood of all games (Bradley & Terry 1952; a tie is half a win for each side),
so that ratings do not depend on the order of the games, as those of sequential Elo updates do
(Chiang et al. 2024, arXiv 2403.04132, section 4). A difference of 400 means odds of 10 to 1.

The intervals are those of the Bayesian bootstrap (Rubin 1981): each prompt gets an exponential
random weight, and the ratings are computed again. Weights are positive, so that every replicate has
finite ratings if the data have; games about the same prompt share a weight, because they are not
independent.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from easyllm.core.errors import DataError
from easyllm.core.json_types import JsonObject
from easyllm.corpus.files.row import Row

Winner = Literal["first", "second", "tie"]
Floats: TypeAlias = NDArray[np.float64]
MEAN, SCALE = 1000.0, 400.0 / math.log(10.0)
_SCORES = {"first": 1.0, "second": 0.0, "tie": 0.5}
_MAX_STEPS = 100


@dataclass(frozen=True, slots=True)
class Game:
    """Two models' answers to one prompt, judged.

    Attributes:
        first, second: names of the models.
        winner: which of them was better.
        prompt: identifies the prompt; games with the same one are resampled together.
    """

    first: str
    second: str
    winner: Winner
    prompt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """A model's line in the table.

    Attributes:
        model: its name.
        elo: its rating; the mean of all models is 1000.
        low, high: bounds of the 95% interval.
        games: number of its games.
        win_rate: wins plus half the ties, divided by `games`.
    """

    model: str
    elo: float
    low: float
    high: float
    games: int
    win_rate: float

    def as_dict(self) -> JsonObject:
        """Returns the fields as a dict."""
        return asdict(self)


def elo_table(
    games: Iterable[Game], *, replicates: int = 1000, seed: int = 0, prior_ties: float = 0.0
) -> list[Rating]:
    """Returns the ratings of all models, best first.

    Args:
        games: judged pairs, in any order; the order does not change a bit of the result.
        replicates: number of bootstrap replicates for the intervals.
        seed: seed of their weights.
        prior_ties: number of ties that are added to every two models that have met, which keeps the
            rating of a model finite that has won, or lost, all of its games.

    Raises:
        DataError: there are fewer than two models, a model plays against itself, or the ratings of
            some models are not determined by the games.

    Example:
        >>> games = [Game("a", "b", "first")] * 3 + [Game("a", "b", "second")]
        >>> [(r.model, round(r.elo)) for r in elo_table(games, replicates=10)]
        [('a', 1095), ('b', 905)]
    """
    listed = sorted(games, key=lambda g: (g.prompt, g.first, g.second, g.winner))
    names = sorted({name for game in listed for name in (game.first, game.second)})
    for game in listed:
        if game.first == game.second:
            raise DataError(f"a pair compares {game.first!r} with itself; name two models")
    if len(names) < 2:
        raise DataError("the file compares fewer than two models; give at least one judged pair")
    number = {name: i for i, name in enumerate(names)}
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(g.prompt for g in listed))}
    first = np.array([number[game.first] for game in listed])
    second = np.array([number[game.second] for game in listed])
    score = np.array([_SCORES[game.winner] for game in listed])
    of_prompt = np.array([prompts[game.prompt] if game.prompt else -1 for game in listed])
    alone = of_prompt < 0  # games without a prompt are independent of each other
    of_prompt[alone] = len(prompts) + np.arange(int(alone.sum()))

    def wins(weights: Floats) -> Floats:
        return _wins(first, second, score, weights, len(names), prior_ties)

    counts = wins(np.ones(len(listed)))
    _check_determined(counts, names)
    ratings = bradley_terry(counts)
    draws = np.random.default_rng(seed).exponential(size=(replicates, int(of_prompt.max()) + 1))
    low = high = ratings
    if replicates:
        found = bradley_terry(np.stack([wins(each[of_prompt]) for each in draws]))
        low, high = np.quantile(found, (0.025, 0.975), axis=0)
    table = []
    for i, name in enumerate(names):
        played = (first == i) | (second == i)
        won = float(score[first == i].sum() + (1 - score[second == i]).sum())
        table.append(
            Rating(
                model=name,
                elo=float(ratings[i]),
                low=float(low[i]),
                high=float(high[i]),
                games=int(played.sum()),
                win_rate=won / int(played.sum()),
            )
        )
    return sorted(table, key=lambda rating: (-rating.elo, rating.model))


def bradley_terry(wins: Floats) -> Floats:
    """Returns the maximum-likelihood ratings on the Elo scale, [..., M] fp64, of mean 1000.

    Newton's method on the concave log-likelihood Σ w_ij log σ(θ_i - θ_j), with halved steps.

    Args:
        wins: [..., M, M], (weighted) number of wins of i over j, half of it for ties; the directed
            graph of wins is strongly connected, without which there is no maximum (Ford 1957).
    """
    games = wins + wins.swapaxes(-1, -2)
    theta = np.zeros(wins.shape[:-1])
    value = _log_likelihood(wins, theta)
    for _ in range(_MAX_STEPS):
        chance = 1 / (1 + np.exp(theta[..., None, :] - theta[..., :, None]))  # of i beating j
        gradient = (wins - games * chance).sum(-1)
        weight = games * chance * (1 - chance)
        hessian = np.eye(wins.shape[-1]) * weight.sum(-1)[..., None] - weight
        # adding a constant to all θ changes nothing: the constant matrix fixes their sum
        constant = weight.mean((-1, -2))[..., None, None]
        step = np.linalg.solve(hessian + constant, gradient[..., None])[..., 0]
        step -= step.mean(-1, keepdims=True)
        size = np.ones(value.shape)
        while True:
            new = _log_likelihood(wins, theta + size[..., None] * step)
            worse = new < value - 1e-12 * np.abs(value)
            if not worse.any():
                break
            size = np.where(worse, size / 2, size)
        theta, value = theta + size[..., None] * step, new
        if np.abs(step).max() < 1e-10:
            break
    ratings: Floats = MEAN + SCALE * (theta - theta.mean(-1, keepdims=True))
    return ratings


def read_games(rows: Iterable[Row]) -> list[Game]:
    """Returns the games of a file of judged pairs: {"a": name, "b": name, "winner": "a|b|tie"}.

    A `prompt` (text or messages) is read if there is one. Pairs without a parsed verdict, whose
    winner is null, are left out.

    Raises:
        DataError: a row is not a judged pair; the message gives its location.
    """
    winners: dict[Any, Winner] = {"a": "first", "b": "second", "tie": "tie"}
    games = []
    for row in rows:
        a, b, winner = (row.values.get(key) for key in ("a", "b", "winner"))
        names = isinstance(a, str) and isinstance(b, str) and a and b
        known = winner is None or (isinstance(winner, str) and winner in winners)
        if not names or not known or "winner" not in row.values:
            raise DataError(
                f"{row.location} is not a judged pair; expected "
                '{"a": "model", "b": "other model", "winner": "a", "b", "tie" or null}'
            )
        if winner is not None:
            prompt = row.values.get("prompt", "")
            assert isinstance(a, str), "checked above"
            assert isinstance(b, str), "checked above"
            games.append(Game(a, b, winners[winner], str(prompt)))
    if not games:
        raise DataError("no pair of the file has a verdict; judge some first")
    return games


def _wins(
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    score: Floats,
    weights: Floats,
    num_models: int,
    prior_ties: float,
) -> Floats:
    """Returns the weighted number of wins of each model over each other, [M, M]."""
    wins = np.zeros((num_models, num_models))
    np.add.at(wins, (first, second), weights * score)
    np.add.at(wins, (second, first), weights * (1 - score))
    met = (wins + wins.T) > 0
    return wins + met * (prior_ties / 2)


def _log_likelihood(wins: Floats, theta: Floats) -> Floats:
    differences = theta[..., None, :] - theta[..., :, None]
    found: Floats = -(wins * np.logaddexp(0.0, differences)).sum((-1, -2))
    return found


def _check_determined(wins: Floats, names: Sequence[str]) -> None:
    """Raises a `DataError` unless every model is connected to every other by wins."""
    met = _reached(wins + wins.T > 0)
    if not met[0].all():
        other = names[int(np.flatnonzero(~met[0])[0])]
        raise DataError(
            f"{names[0]!r} and {other!r} are not connected by any pairs, so their ratings cannot "
            "be compared; judge pairs between the two groups of models"
        )
    above = _reached(wins > 0)
    for i, name in enumerate(names):
        if not above[:, i].all() or not above[i].all():
            what = "lost" if above[i].all() else "won"
            raise DataError(
                f"the rating of {name!r} is infinite: no pair was {what} by it or its group against"
                " the others; judge more pairs, or set --prior-ties 1"
            )


def _reached(edges: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Returns which nodes are reachable from which, [M, M] bool, each from itself too."""
    found: NDArray[np.bool_] = edges | np.eye(len(edges), dtype=bool)
    for middle in range(len(edges)):
        found = found | (found[:, middle, None] & found[None, middle])
    return found


__all__ = ["Game", "Rating", "Winner", "bradley_terry", "elo_table", "read_games"]
