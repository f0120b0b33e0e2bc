"""The `easyllm eval` command."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from easyllm.cli.adapter import AdapterFolder
from easyllm.cli.models import Model
from easyllm.cli.options import Values, with_flags
from easyllm.cli.output import JsonFlag, home_path, print_json, print_pairs, print_table
from easyllm.cli.sampling import LOADING


class Task(StrEnum):
    """What is measured."""

    answers = "answers"
    perplexity = "perplexity"


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command("eval")(evaluate)


@with_flags
def evaluate(
    model: Model,
    data: Annotated[
        Path | None,
        typer.Argument(
            callback=home_path,
            help="A .json or .jsonl file of conversations; for perplexity, a file of texts: plain "
            "text, Markdown, JSONL, Parquet.",
        ),
    ] = None,
    *,
    task: Annotated[
        Task,
        typer.Option(
            help="The loss on responses and recall (answers), or the perplexity of texts."
        ),
    ] = Task.answers,
    same: Annotated[
        Path | None, typer.Option("--data", callback=home_path, help="The same as DATA.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="answers: tokens of a response; by default 32.")
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
    loading: Annotated[Values, LOADING.only("dtype", "quantize")],
    adapter: AdapterFolder = None,
    json_output: JsonFlag = False,
) -> None:
    """Measure a model on a file: the loss on responses and recall, or the perplexity of texts.

    Recall is the share of rows whose `key` occurs in the model's own response. For perplexity, a
    text longer than a window is scored with a sliding window: each token once, and after the first
    window with more than context - stride tokens before it.

    [bold]Examples[/bold]

        easyllm eval smollm2 questions.jsonl

        easyllm eval runs/mine/adapter questions.jsonl --json

        easyllm eval out/gptq held_out.txt --task perplexity --context 1024 --stride 512
    """
    from easyllm.core.errors import ConfigError

    if (data is None) == (same is None):
        raise ConfigError("eval needs one file to measure on; give DATA, or --data FILE")
    path = data or same
    assert path is not None, "checked above"
    loads = {"adapter": adapter, **{k: v for k, v in loading.items() if v is not None}}
    windows = {"context": context, "stride": stride, "key": text_key}
    windows = {name: value for name, value in windows.items() if value is not None}
    if task is Task.perplexity:
        if max_tokens is not None:
            raise ConfigError("--max-tokens concerns answers, not perplexity; leave it out")
        _perplexity(model, path, loads, windows, json_output=json_output)
        return
    if windows:
        option = next(iter(windows)).replace("key", "text-key")
        raise ConfigError(f"--{option} concerns perplexity; add --task perplexity")
    _answers(model, path, loads, max_tokens or 32, json_output=json_output)


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
