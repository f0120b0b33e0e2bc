"""The tasks of `easyllm eval` that compare answers: win-rate, elo, over-optimisation."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyllm.cli.output import print_json, print_pairs, print_table
from easyllm.cli.scorers import KINDS, load_scorer
from easyllm.core.json_types import JsonObject

if TYPE_CHECKING:
    from easyllm.evaluate.answer_store import AnswerStore
    from easyllm.evaluate.comparisons import Comparer
    from easyllm.evaluate.over_optimisation import OverOptimisation
    from easyllm.evaluate.prompt_rows import PromptRow
    from easyllm.evaluate.sampled_answers import SampledAnswer


def show_win_rate(
    model: str,
    data: Path,
    loads: JsonObject,
    sampling: JsonObject,
    *,
    against: str,
    judge: str,
    judge_options: JsonObject,
    output: Path | None,
    limit: int | None,
    json_output: bool,
) -> None:
    """Compares the answers of two models, and prints how often those of the first are better."""
    from easyllm.core.atomic import check_output_free, write_atomic
    from easyllm.evaluate.prompt_rows import read_prompts
    from easyllm.evaluate.win_rate import judged_lines, win_rate

    if output is not None:
        check_output_free(output)
    prompts = read_prompts(data, limit=limit)
    comparer = _comparer(judge, judge_options)
    adapter = loads.pop("adapter", None)
    ours = answers_of(model, prompts, {**loads, "adapter": adapter}, sampling)
    theirs = answers_of(against, prompts, loads, sampling)
    result = win_rate(
        [group[0] for group in ours],
        [group[0] for group in theirs],
        comparer,
    )
    if output is not None:
        name = model if adapter is None else str(adapter)
        write_atomic(output, judged_lines(result, name, against))
    cached = _reused(comparer)
    if json_output:
        print_json({"against": against, "judge": comparer.name, **result.as_dict(), **cached})
        return
    print_pairs(
        {
            "win rate": f"{result.win_rate:.1%} ± {result.standard_error:.1%} against {against}",
            "wins, ties, losses": f"{result.wins:,}, {result.ties:,}, {result.losses:,}",
            "identical answers": f"{result.identical:,}, counted as ties",
            "unparsed": f"{result.unparsed:,} pairs without a verdict, left out",
            "mean length": " and ".join(f"{length:.1f}" for length in result.mean_tokens)
            + f" tokens; {result.truncated:,} answers reached the maximum",
            "judge": comparer.name,
        }
    )
    if cached:
        sys.stdout.write(
            f"{cached['reused_verdicts']:,} verdicts are from {cached['judge_cache']}; remove it, "
            "or name another --judge-cache, if the model at the address has changed\n"
        )
    if (bias := result.bias) is not None:
        sys.stdout.write(
            f"position bias: {bias.first_share:.1%} of the verdicts for an answer chose the first "
            f"one (50% without a bias); the orders disagree on {bias.disagreement:.1%} of the pairs"
            ", which count as ties\n"
        )


def show_elo(data: Path, *, seed: int, prior_ties: float, json_output: bool) -> None:
    """Prints the Elo table of a file of judged pairs."""
    from easyllm.evaluate.elo import elo_table, read_games
    from easyllm.examples.data_file import read_rows

    games = read_games(read_rows(data))
    table = elo_table(games, seed=seed, prior_ties=prior_ties)
    if json_output:
        scores: list[JsonObject] = [
            {
                "name": f"elo/{rating.model}",
                "value": rating.elo,
                "standard_error": (rating.high - rating.low) / (2 * 1.96),
                "n": rating.games,
                "unparsed": 0,
                "truncated": 0,
            }
            for rating in table
        ]
        print_json({"scores": scores, "models": [rating.as_dict() for rating in table]})
        return
    rows = [
        (r.model, f"{r.elo:.0f}", f"{r.low:.0f} to {r.high:.0f}", f"{r.win_rate:.1%}", r.games)
        for r in table
    ]
    print_table("Elo", ("model", "rating", "95% interval", "win rate", "pairs"), rows)


def show_over_optimisation(
    model: str,
    data: Path,
    loads: JsonObject,
    sampling: JsonObject,
    *,
    proxy: str,
    gold: str,
    samples: int,
    figure: Path | None,
    limit: int | None,
    json_output: bool,
) -> None:
    """Prints gold and proxy reward of best-of-n, and draws them by KL divergence."""
    from easyllm.core.atomic import check_output_free, write_atomic
    from easyllm.evaluate.over_optimisation import figure as draw
    from easyllm.evaluate.over_optimisation import over_optimisation
    from easyllm.evaluate.prompt_rows import read_prompts

    if figure is not None:
        check_output_free(figure)
    scorers = [load_scorer(source) for source in (proxy, gold)]
    prompts = read_prompts(data, limit=limit)
    groups = answers_of(model, prompts, loads, sampling, n=samples)
    flat = [answer for group in groups for answer in group]
    proxies, golds = (
        [scores[i : i + samples] for i in range(0, len(scores), samples)]
        for scores in (scorer(flat) for scorer in scorers)
    )
    result = over_optimisation(proxies, golds)
    if figure is not None:
        write_atomic(figure, draw(result))
    if json_output:
        last = result.points[-1]
        scores = [
            {
                "name": f"{name}_best_of_{last.n}",
                "value": getattr(last, name),
                "standard_error": getattr(last, f"{name}_error"),
                "n": result.prompts,
                "unparsed": 0,
                "truncated": sum(answer.truncated for answer in flat),
            }
            for name in ("proxy", "gold")
        ]
        print_json({"scores": scores, "proxy": proxy, "gold": gold, **result.as_dict()})
        return
    _print_curves(result)


def _print_curves(result: "OverOptimisation") -> None:
    """Prints a table of both rewards, and where the gold reward is highest."""
    rows = [
        (
            p.n,
            f"{p.kl_nats:.3f}",
            f"{p.proxy:.4g} ± {p.proxy_error:.2g}",
            f"{p.gold:.4g} ± {p.gold_error:.2g}",
        )
        for p in result.points
    ]
    print_table("Best-of-n", ("n", "KL (nats)", "proxy reward", "gold reward"), rows)
    sys.stdout.write(
        f"gold reward is highest at n = {result.peak_n}, and {result.drop:.4g} ± "
        f"{result.drop_error:.2g} lower at n = {result.samples}"
        + (": the proxy is over-optimised\n" if result.over_optimised else "\n")
    )


def answers_of(
    model: str,
    prompts: "list[PromptRow]",
    loads: JsonObject,
    sampling: JsonObject,
    *,
    n: int = 1,
    store: "AnswerStore | None" = None,
) -> "list[list[SampledAnswer]]":
    """Loads a model and returns `n` answers to each prompt; the model is released at the end.

    A `store` holds the answers of an interrupted command.
    """
    from easyllm.cli.sampling import load_llm, sampling_params
    from easyllm.evaluate.sampled_answers import sample_answers

    values = dict(sampling)
    seed = values.pop("seed", None) or 0
    llm = load_llm(model, quiet=True, **loads)
    return sample_answers(llm, prompts, sampling_params(values), n=n, seed=seed, store=store)


def _reused(comparer: "Comparer") -> JsonObject:
    """Returns how many verdicts of an LLM judge were in its cache, and where that is."""
    from easyllm.evaluate.judge import Judge

    if not isinstance(comparer, Judge) or not comparer.reused:
        return {}
    return {"reused_verdicts": comparer.reused, "judge_cache": str(comparer.cache.path)}


def _comparer(judge: str, options: dict[str, Any]) -> "Comparer":
    """Returns the judge at an address, or the comparison of scores."""
    import os

    from easyllm.core.config import validate
    from easyllm.core.errors import ConfigError
    from easyllm.evaluate.judge import Judge
    from easyllm.evaluate.judge_client import base_url
    from easyllm.evaluate.judge_config import JudgeConfig
    from easyllm.evaluate.reply_cache import default_cache
    from easyllm.evaluate.scorers import ScoreComparer

    if judge.startswith(KINDS):
        if options:
            name = next(iter(options)).replace("_", "-")
            raise ConfigError(f"--judge-{name} concerns an LLM judge, not {judge!r}; leave it out")
        return ScoreComparer(judge, load_scorer(judge))
    options = dict(options)
    cache, variable = options.pop("cache", None), options.pop("key_env", None)
    key = None if variable is None else os.environ.get(variable)
    if variable is not None and not key:
        raise ConfigError(
            f"--judge-key-env {variable}: the environment variable is not set; export the API key"
        )
    flags = {"url": "--judge"} | {name: f"--judge-{name.replace('_', '-')}" for name in options}
    values = {"url": judge, **options}
    config = validate(JudgeConfig, values, source="options of the judge", flags=flags)
    return Judge(config, key=key, cache=cache or default_cache(base_url(config.url)))


__all__ = ["answers_of", "show_elo", "show_over_optimisation", "show_win_rate"]
