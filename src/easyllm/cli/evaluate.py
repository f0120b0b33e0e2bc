"""The `easyllm eval` command."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from easyllm.cli.adapter import AdapterFolder
from easyllm.cli.options import Values, option, with_flags
from easyllm.cli.output import JsonFlag, home_path, print_json, print_pairs, print_table
from easyllm.cli.sampling import LOADING, SAMPLING
from easyllm.cli.scorers import METAVAR
from easyllm.core.json_types import JsonMapping
from easyllm.evaluate.judge_config import JudgeConfig


class Task(StrEnum):
    """What is measured."""

    answers = "answers"
    perplexity = "perplexity"
    win_rate = "win-rate"
    elo = "elo"
    over_optimisation = "over-optimisation"


_SAMPLED = ("limit", "max_tokens", "temperature", "seed")
_JUDGE = (
    *("model", "key_env", "cache", "language", "reason"),
    *("max_tokens", "timeout_s", "retries", "concurrency"),
)
OPTIONS: dict[Task, tuple[str, ...]] = {
    Task.answers: ("max_tokens",),
    Task.perplexity: ("context", "stride", "text_key"),
    Task.win_rate: ("against", "judge", "output", *_SAMPLED, *(f"judge_{f}" for f in _JUDGE)),
    Task.elo: ("seed", "prior_ties"),
    Task.over_optimisation: ("proxy", "gold", "samples", "figure", *_SAMPLED),
}
"""The options that each task reads; others are refused."""


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command("eval")(evaluate)


@with_flags
def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(help="smollm2, a checkpoint folder, a .gguf file, or hf:org/name."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Argument(
            callback=home_path,
            help="A .json or .jsonl file of conversations, or of prompts (win-rate, "
            "over-optimisation), or of judged pairs (elo); for perplexity, a file of texts: plain "
            "text, Markdown, JSONL, Parquet.",
        ),
    ] = None,
    *,
    task: Annotated[
        Task,
        typer.Option(
            help="The loss on responses and recall (answers), the perplexity of texts, how often "
            "answers are better than a reference's (win-rate), ratings of several models (elo), or "
            "gold against proxy reward of best-of-n (over-optimisation)."
        ),
    ] = Task.answers,
    same: Annotated[
        Path | None, typer.Option("--data", callback=home_path, help="The same as DATA.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a response; by default 32 (answers), else 256."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="perplexity: tokens per window; by default the model's context."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="perplexity: tokens from one window to the next; by default half the context.",
        ),
    ] = None,
    text_key: Annotated[
        str | None,
        typer.Option(help="perplexity: key or column of the text in rows; by default text."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="win-rate: the reference model.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="URL|reward:FOLDER|rule:NAME",
            help="win-rate: an LLM at an address with OpenAI's API, a reward model, or a rule "
            "such as digits or length,target=40.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(callback=home_path, help="win-rate: a new .jsonl file of the judged pairs."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts to read; by default all.")] = (
        None
    ),
    proxy: Annotated[
        str | None,
        typer.Option(
            metavar=METAVAR,
            help="over-optimisation: the reward that chooses the best answer.",
        ),
    ] = None,
    gold: Annotated[
        str | None,
        typer.Option(
            metavar=METAVAR,
            help="over-optimisation: the reward that measures what is wanted.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=2, help="over-optimisation: answers to each prompt; by default 16."),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(callback=home_path, help="over-optimisation: a new .svg file of the curves."),
    ] = None,
    prior_ties: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="elo: ties added to every two models that have met, which keeps the rating of an "
            "undefeated model finite; by default 0.",
        ),
    ] = None,
    judge_model: Annotated[str | None, option(JudgeConfig, "model", "--judge-model")] = None,
    judge_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="VARIABLE", help="Environment variable with the API key of the judge."
        ),
    ] = None,
    judge_cache: Annotated[
        Path | None,
        typer.Option(
            callback=home_path,
            help="File of the judge's replies so far, with which an interrupted run resumes.",
        ),
    ] = None,
    judge_language: Annotated[
        str | None, option(JudgeConfig, "language", "--judge-language", metavar="en|zh")
    ] = None,
    judge_reason: Annotated[
        bool | None, option(JudgeConfig, "reason", "--judge-reason/--no-judge-reason")
    ] = None,
    judge_max_tokens: Annotated[
        int | None, option(JudgeConfig, "max_tokens", "--judge-max-tokens", low=1)
    ] = None,
    judge_timeout_s: Annotated[
        float | None, option(JudgeConfig, "timeout_s", "--judge-timeout-s")
    ] = None,
    judge_retries: Annotated[int | None, option(JudgeConfig, "retries", "--judge-retries")] = None,
    judge_concurrency: Annotated[
        int | None, option(JudgeConfig, "concurrency", "--judge-concurrency", low=1)
    ] = None,
    sampling: Annotated[
        Values,
        SAMPLING.only("temperature", "seed").starting(temperature=None),
    ],
    loading: Annotated[Values, LOADING.only("dtype", "quantize")],
    adapter: AdapterFolder = None,
    json_output: JsonFlag = False,
) -> None:
    """Measure a model on a file: loss and recall, perplexity, win rate against another model, Elo.

    Recall is the share of rows whose `key` occurs in the model's own response. For perplexity, a
    text longer than a window is scored with a sliding window: each token once, and after the first
    window with more than context - stride tokens before it. A win rate compares answers to the same
    prompts (greedy ones by default); a judge sees each pair in both orders. Over-optimisation needs
    no training: the best of n sampled answers by a proxy reward, measured by a gold reward.

    [bold]Examples[/bold]

        easyllm eval smollm2 questions.jsonl

        easyllm eval runs/mine/adapter questions.jsonl --json

        easyllm eval out/gptq held_out.txt --task perplexity --context 1024 --stride 512

        easyllm eval tuned p.jsonl --task win-rate --against smollm2 --judge http://localhost:8420

        easyllm eval tuned p.jsonl --task win-rate --against smollm2 --judge reward:runs/rm

        easyllm eval --task elo --data judged.jsonl

        easyllm eval smollm2 p.jsonl --task over-optimisation --proxy reward:rm --gold rule:exact
    """
    from easyllm.core.errors import ConfigError

    if task is Task.elo and model is not None:
        if data is not None:
            raise ConfigError("elo reads a file of judged pairs and no model; give --data FILE")
        data, model = Path(model), None  # the only argument is the file
    if (data is None) == (same is None):
        raise ConfigError("eval needs one file to measure on; give DATA, or --data FILE")
    if model is None and task is not Task.elo:
        raise ConfigError(f"--task {task.value} measures a model; give MODEL before the file")
    path = data or same
    assert path is not None, "checked above"
    given: dict[str, Any] = {
        "max_tokens": max_tokens,
        "context": context,
        "stride": stride,
        "text_key": text_key,
        "against": against,
        "judge": judge,
        "output": output,
        "limit": limit,
        "proxy": proxy,
        "gold": gold,
        "samples": samples,
        "figure": figure,
        "prior_ties": prior_ties,
        "judge_model": judge_model,
        "judge_key_env": judge_key_env,
        "judge_cache": judge_cache,
        "judge_language": judge_language,
        "judge_reason": judge_reason,
        "judge_max_tokens": judge_max_tokens,
        "judge_timeout_s": judge_timeout_s,
        "judge_retries": judge_retries,
        "judge_concurrency": judge_concurrency,
        **sampling,
    }
    given = {name: value for name, value in given.items() if value is not None}
    _check_options(task, given)
    loads = {"adapter": adapter, **{k: v for k, v in loading.items() if v is not None}}
    if task is Task.elo:
        from easyllm.cli.evaluate_preferences import show_elo

        if loads.pop("adapter") is not None or loads:
            raise ConfigError(
                "elo reads a file of judged pairs and loads no model; leave out "
                "--adapter, --dtype and --quantize"
            )
        seed, ties = given.get("seed", 0), given.get("prior_ties", 0.0)
        show_elo(path, seed=seed, prior_ties=ties, json_output=json_output)
        return
    assert model is not None, "checked above"
    match task:
        case Task.perplexity:
            windows = {name.replace("text_", ""): value for name, value in given.items()}
            _perplexity(model, path, loads, windows, json_output=json_output)
        case Task.answers:
            _answers(model, path, loads, max_tokens or 32, json_output=json_output)
        case _:
            _compared(task, model, path, loads, given, json_output=json_output)


def _check_options(task: Task, given: JsonMapping) -> None:
    """Raises a `ConfigError` for an option that the task does not read."""
    from easyllm.core.errors import ConfigError

    for name in given:
        if name not in OPTIONS[task]:
            tasks = [each.value for each, names in OPTIONS.items() if name in names]
            known = f"{', '.join(tasks[:-1])} and {tasks[-1]}" if tasks[1:] else tasks[0]
            raise ConfigError(
                f"--{name.replace('_', '-')} concerns {known}, not {task.value}; leave it out, or "
                f"add --task {tasks[-1]}"
            )


def _compared(
    task: Task,
    model: str,
    data: Path,
    loads: dict[str, Any],
    given: JsonMapping,
    *,
    json_output: bool,
) -> None:
    """Runs a task that generates answers and compares or scores them."""
    from easyllm.cli.evaluate_preferences import show_over_optimisation, show_win_rate
    from easyllm.core.errors import ConfigError

    needed = ("against", "judge") if task is Task.win_rate else ("proxy", "gold")
    for name in needed:
        if name not in given:
            raise ConfigError(f"--task {task.value} needs --{name}; see easyllm eval --help")
    sampling = {"max_tokens": 256, "temperature": 0.0 if task is Task.win_rate else 1.0}
    sampling |= {k: given[k] for k in ("max_tokens", "temperature", "seed") if k in given}
    if task is Task.win_rate:
        options = {k.removeprefix("judge_"): v for k, v in given.items() if k.startswith("judge_")}
        show_win_rate(
            model,
            data,
            loads,
            sampling,
            against=given["against"],
            judge=given["judge"],
            judge_options=options,
            output=given.get("output"),
            limit=given.get("limit"),
            json_output=json_output,
        )
        return
    if not sampling["temperature"]:
        raise ConfigError("--temperature 0 gives the same answer every time; set it above 0")
    show_over_optimisation(
        model,
        data,
        loads,
        sampling,
        proxy=given["proxy"],
        gold=given["gold"],
        samples=given.get("samples", 16),
        figure=given.get("figure"),
        limit=given.get("limit"),
        json_output=json_output,
    )


def _answers(
    model: str, data: Path, loads: dict[str, Any], max_tokens: int, *, json_output: bool
) -> None:
    from easyllm.engine import LLM
    from easyllm.evaluate import evaluate_answers

    report = evaluate_answers(LLM(model, **loads), data, max_tokens=max_tokens)
    if json_output:
        print_json(report.as_dict())
        return
    if report.answers:
        rows = [(a.question, a.answer, a.key, "yes" if a.correct else "no") for a in report.answers]
        print_table("Answers", ("question", "answer", "key", "recalled"), rows)
    figures = {"rows": report.num_rows, "tokens": report.num_tokens}
    figures_text = {**figures, "loss (nats/token)": f"{report.loss_nats:.4f}"}
    if report.recall is not None:
        figures_text["recalled"] = f"{report.recall:.1%}"
    print_pairs(figures_text)


def _perplexity(
    model: str, data: Path, loads: dict[str, Any], windows: dict[str, Any], *, json_output: bool
) -> None:
    from easyllm.core.device import pick_device
    from easyllm.evaluate.text_perplexity import perplexity_of_file
    from easyllm.models import load_model, load_tokenizer, split_adapter

    source, folder = split_adapter(model, loads.pop("adapter"))
    on = pick_device("auto").type
    values = {"dtype": "float32" if on == "cpu" else "bfloat16", **loads}
    loaded = load_model(source, device=on, adapter=folder, **values)
    found = perplexity_of_file(loaded, load_tokenizer(source), data, **windows)
    if json_output:
        print_json(found.as_dict())
        return
    its = found.perplexity
    per_byte, per_word = its.bits_per_byte, found.word_perplexity
    print_pairs(
        {
            "perplexity per token": f"{its.perplexity:.4f}",
            "loss (nats/token)": f"{its.loss_nats:.4f}",
            "bits per byte": "-" if per_byte is None else f"{per_byte:.4f}",
            "perplexity per word": "-" if per_word is None else f"{per_word:.4f}",
            "scored": f"{its.tokens:,} tokens, {its.bytes:,} bytes, {found.words:,} words "
            f"of {found.texts:,} {'text' if found.texts == 1 else 'texts'}",
            "window": f"{found.context:,} tokens, stride {found.stride:,}",
        }
    )
