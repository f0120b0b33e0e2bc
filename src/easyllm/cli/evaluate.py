"""The `easyllm eval` command."""

from pathlib import Path
from typing import Annotated, Any

import typer

from easyllm.cli.adapter import AdapterFolder
from easyllm.cli.eval_options import (
    JUDGED,
    MEASURED,
    CacheFile,
    Compared,
    DataFile,
    FigureFile,
    IncludeFolder,
    OptionalModel,
    PairsFile,
    ReferencesFile,
    SameFile,
    ShotsFile,
    Task,
    TaskFlag,
    find_task,
    options_of,
)
from easyllm.cli.options import Values, with_flags
from easyllm.cli.output import JsonFlag, print_json, print_pairs, print_table
from easyllm.cli.sampling import LOADING, SAMPLING, load_llm
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonMapping


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command("eval")(evaluate)


@with_flags
def evaluate(
    model: OptionalModel = None,
    data: DataFile = None,
    *,
    task: TaskFlag = "answers",
    same: SameFile = None,
    references: ReferencesFile = None,
    shots_data: ShotsFile = None,
    include: IncludeFolder = None,
    compare: Compared = None,
    measured: Annotated[Values, MEASURED],
    output: PairsFile = None,
    figure: FigureFile = None,
    judged: Annotated[Values, JUDGED],
    judge_cache: CacheFile = None,
    sampling: Annotated[
        Values,
        SAMPLING.only("temperature", "seed").starting(temperature=None),
    ],
    loading: Annotated[Values, LOADING.only("dtype", "quantize")],
    adapter: AdapterFolder = None,
    json_output: JsonFlag = False,
) -> None:
    """Measure a model: tasks, loss and recall, perplexity, win rate against another model, Elo.

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

        easyllm eval smollm2 --task gsm8k --data gsm8k_test.jsonl --limit 100 --output runs/gsm8k

        easyllm eval smollm2 --task mine.yaml --data questions.jsonl --choices generated

        easyllm eval --compare runs/gsm8k runs/gsm8k-tuned

        easyllm eval smollm2 --task lm-eval:my_task --include my_tasks

        easyllm eval --task elo --data judged.jsonl

        easyllm eval smollm2 p.jsonl --task over-optimisation --proxy reward:rm --gold rule:exact
    """
    if compare is not None:
        _compare(compare, model, json_output=json_output)
        return
    kind = find_task(task)
    given = options_of(
        kind,
        measured,
        judged,
        sampling,
        output=output,
        figure=figure,
        judge_cache=judge_cache,
        references=references,
        shots_data=shots_data,
        include=include,
    )
    loads = {"adapter": adapter, **{k: v for k, v in loading.items() if v is not None}}
    if kind in (Task.items, Task.lm_eval):
        _task(kind, task, model, (data, same), loads, given, json_output=json_output)
        return
    source, path = _subject(kind, model, data, same)
    if source is None:
        _elo(path, loads, given, json_output=json_output)
    elif kind is Task.perplexity:
        windows = {name.replace("text_", ""): value for name, value in given.items()}
        _perplexity(source, path, loads, windows, json_output=json_output)
    elif kind is Task.answers:
        _answers(source, path, loads, given.get("max_tokens", 32), json_output=json_output)
    else:
        _compared(kind, source, path, loads, given, json_output=json_output)


def _compare(folders: tuple[Path, Path], model: str | None, *, json_output: bool) -> None:
    from easyllm.cli.evaluate_tasks import show_comparison

    if model is not None:
        raise ConfigError("--compare reads two folders and no model; leave out MODEL")
    show_comparison(*folders, json_output=json_output)


def _task(
    kind: Task,
    name: str,
    model: str | None,
    files: tuple[Path | None, Path | None],
    loads: dict[str, Any],
    given: dict[str, Any],
    *,
    json_output: bool,
) -> None:
    """Runs a task of items, or one of lm-eval's."""
    from easyllm.cli.evaluate_tasks import show_lm_eval, show_task

    if model is None:
        raise ConfigError(f"--task {name} measures a model; give MODEL first")
    if kind is Task.lm_eval:
        if files != (None, None):
            raise ConfigError("lm-eval's tasks name their data themselves; leave out DATA")
        names = name.removeprefix("lm-eval:").split(",")
        show_lm_eval(names, model, loads, given, json_output=json_output)
        return
    _, path = _subject(kind, model, *files)
    show_task(name, model, path, loads, given, json_output=json_output)


def _subject(
    task: Task, model: str | None, data: Path | None, same: Path | None
) -> tuple[str | None, Path]:
    """Returns the model, None for elo, and the file.

    Raises:
        ConfigError: one of them is missing, or given twice.
    """
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
    return model, path


def _elo(path: Path, loads: dict[str, Any], given: JsonMapping, *, json_output: bool) -> None:
    """Prints ratings of the models in a file of judged pairs."""
    from easyllm.cli.evaluate_preferences import show_elo

    if loads.pop("adapter") is not None or loads:
        raise ConfigError(
            "elo reads a file of judged pairs and loads no model; leave out "
            "--adapter, --dtype and --quantize"
        )
    seed, ties = given.get("seed", 0), given.get("prior_ties", 0.0)
    show_elo(path, seed=seed, prior_ties=ties, json_output=json_output)


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
    from easyllm.evaluate.answers import evaluate_answers
    from easyllm.examples.conversations import conversations
    from easyllm.examples.data_file import read_rows

    list(conversations(read_rows(data)))  # a mistake in a row is told before the model is loaded
    report = evaluate_answers(load_llm(model, quiet=True, **loads), data, max_tokens=max_tokens)
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
    from easyllm.evaluate.text_perplexity import check_text_file, perplexity_of_file
    from easyllm.models import load_model, load_tokenizer, split_adapter

    source, folder = split_adapter(model, loads.pop("adapter"))
    check_text_file(data, key=windows.get("key", "text"))
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
