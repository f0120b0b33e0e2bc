"""The tasks of `easyllm eval` with items: local ones, lm-eval's, and the comparison of two runs."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyllm.cli.output import print_json, print_pairs, print_table
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonMapping, JsonObject

if TYPE_CHECKING:
    from easyllm.evaluate.task_config import TaskConfig
    from easyllm.evaluate.task_items import Item


def show_task(
    name: str,
    model: str,
    data: Path,
    loads: dict[str, Any],
    given: JsonMapping,
    *,
    json_output: bool,
) -> None:
    """Runs a task and prints its scores.

    Raises:
        ConfigError, DataError, SourceError: the task, an option or the data is wrong.
    """
    from easyllm.cli.sampling import load_llm, sampling_params
    from easyllm.evaluate.task_config import load_task
    from easyllm.evaluate.task_prompts import PromptForm, check_form, check_form_of_task
    from easyllm.evaluate.task_report import result_of, write_result, write_settings
    from easyllm.evaluate.task_run import TaskRunner, check_run_folder
    from easyllm.prompt.library import system_message

    task = load_task(name)
    if "shots" in given:
        task = task.model_copy(update={"shots": given["shots"]})
    if "system" in given:
        task = task.model_copy(update={"system": system_message(given["system"])})
    if "choices" in given and task.kind != "choice":
        raise ConfigError(f"task {task.name!r} has no choices; leave out --choices")
    if given.get("choices") not in (None, "likelihood", "generated"):
        raise ConfigError(
            f"--choices {given['choices']}: choices are compared by likelihood or generated; give "
            "one of these words"
        )
    likelihood = task.kind == "choice" and given.get("choices") != "generated"
    metrics = task.metrics_for(likelihood=likelihood)
    shots, items = _items(task, data, given)
    unread = given.keys() & {"max_tokens", "temperature", "seed"}
    if unread and (likelihood or task.kind == "text"):
        flag = sorted(unread)[0].replace("_", "-")
        raise ConfigError(f"task {task.name!r} generates nothing; leave out --{flag}")
    output: Path | None = given.get("output")
    asked = PromptForm(
        likelihood=likelihood, chat=given.get("chat", False), thinking=given.get("thinking")
    )
    check_form_of_task(task, asked)
    sampling = {"temperature": 0.0}
    sampling |= {k: given[k] for k in ("max_tokens", "temperature", "seed") if k in given}
    params = sampling_params(sampling)
    if output is not None:
        check_run_folder(output)
    llm = load_llm(model, quiet=json_output, **loads)
    generates = task.kind != "text" and not likelihood
    chat = given.get("chat", generates and llm.tokenizer.chat_template is not None)
    form = replace(asked, chat=chat)
    check_form(llm, task, form)
    runner = TaskRunner(llm, model, task, form, shots=shots, params=params, output=output)
    if output is not None:
        write_settings(output, runner.settings)
    run = runner.run(items)
    result = result_of(run, metrics, language=task.language)
    if output is not None:
        write_result(output, run, metrics, result)
    _print(result, json_output=json_output)


def show_lm_eval(
    names: list[str], model: str, loads: dict[str, Any], given: JsonMapping, *, json_output: bool
) -> None:
    """Runs tasks of lm-eval and prints their scores.

    Raises:
        ConfigError, SourceError: lm-eval is not installed, or has no such task; or an option is
            wrong.
    """
    from easyllm.evaluate.harness import check_lm_eval, run_lm_eval

    output: Path | None = given.get("output")
    options: dict[str, Any] = {
        "limit": given.get("limit"),
        "shots": given.get("shots"),
        "chat": given.get("chat", False),
        "include": given.get("include"),
        "output": output,
    }
    if "://" in model:
        used = [k for k, v in loads.items() if v is not None]
        if used:
            raise ConfigError(f"--{used[0]} concerns a model, not a server; leave it out")
        result = run_lm_eval(names, url=model, **options)
    else:
        from easyllm.cli.sampling import load_llm

        check_lm_eval(names, options["include"])  # before the model is loaded
        llm = load_llm(model, quiet=json_output, **loads)
        result = run_lm_eval(names, llm=llm, source=model, **options)
    _print(result, json_output=json_output)


def show_comparison(first: Path, second: Path, *, json_output: bool) -> None:
    """Prints the differences of two evaluations.

    Raises:
        ConfigError, DataError: they cannot be compared.
    """
    from easyllm.evaluate.task_report import compare

    found = compare(first, second)
    if json_output:
        print_json(found)
        return
    rows = [
        (
            s["name"],
            f"{s['first']:.4f}",
            f"{s['second']:.4f}",
            f"{s['difference']:+.4f}",
            f"{s['low']:+.4f} … {s['high']:+.4f}",
            f"{s['p_value']:.4f}",
        )
        for s in found["scores"]
    ]
    columns = ("metric", "first", "second", "difference", "95% interval", "p")
    print_table(f"{found['task']}, {found['scores'][0]['n']} items, paired", columns, rows)


def _items(task: "TaskConfig", data: Path, given: JsonMapping) -> "tuple[list[Item], list[Item]]":
    """Returns the examples and the items that are evaluated."""
    from easyllm.evaluate.task_items import read_items

    limit, shots_file = given.get("limit"), given.get("shots_data")
    references = given.get("references")
    if shots_file is not None:
        if not task.shots:
            raise ConfigError("--shots-data gives examples, but --shots is 0; set it")
        shots = read_items(task, shots_file, limit=task.shots)
        items = read_items(task, data, references=references, limit=limit)
    else:
        wanted = None if limit is None else limit + task.shots
        every = read_items(task, data, references=references, limit=wanted)
        shots, items = every[: task.shots], every[task.shots :]
    if len(shots) < task.shots or not items:
        raise ConfigError(
            f"--shots {task.shots} needs as many examples and at least one item, but there are "
            f"{len(shots) + len(items)}; lower --shots, or give --shots-data FILE"
        )
    return shots, items


def _print(result: JsonObject, *, json_output: bool) -> None:
    """Prints a result as a table, or as JSON."""
    if json_output:
        print_json(result)
        return
    rows = []
    for score in result["scores"]:
        error, low = score["standard_error"], score.get("low")
        rows.append(
            (
                score["name"],
                f"{score['value']:.4f}",
                "-" if error is None else f"{error:.4f}",
                "-" if low is None else f"{low:.4f} … {score['high']:.4f}",
                score["n"],
            )
        )
    columns = ("metric", "value", "standard error", "95% interval", "n")
    print_table(str(result["task"]), columns, rows)
    shown = ("model", "shots", "choices", "thinking", "chat", "truncated", "unparsed")
    print_pairs({name: result[name] for name in shown if result.get(name) is not None})
    if result.get("unparsed"):
        sys.stdout.write("unparsed answers are counted as wrong\n")


__all__ = ["show_comparison", "show_lm_eval", "show_task"]
