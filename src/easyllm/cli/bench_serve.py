"""The `easyllm bench serve` command."""

import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from easyllm.cli.options import FlagGroup, Values, checked_flags, with_flags
from easyllm.cli.output import JsonFlag, home_path, print_json, print_pairs, print_table
from easyllm.core.json_types import JsonObject
from easyllm.serve.load_options import Load, LoadOptions

if TYPE_CHECKING:
    from easyllm.serve.load_test import LoadTest

LOAD = FlagGroup(
    LoadOptions,
    *("model", "rate", "concurrency", "requests", "warmup", "prompt_tokens", "max_tokens"),
    *("ignore_eos", "dialect", "seed", "timeout_s"),
    flags={"timeout_s": "--timeout"},
    metavars={"dialect": "chat|completions"},
)
DataFile = Annotated[
    Path | None,
    typer.Option(
        "--data",
        callback=home_path,
        help="File of prompts to send in place of random ones: JSON lines with prompt or messages, "
        "or a prompt per line.",
    ),
]
LATENCIES = {
    "first_token_s": "first token",
    "inter_token_s": "between tokens",
    "latency_s": "whole answer",
}


@with_flags
def serve(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of the server.")],
    *,
    load: Annotated[Values, LOAD],
    data: DataFile = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="EASYLLM_API_KEY", help="API key of the server.")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Measure throughput and latency of any server with OpenAI's API, under load.

    Ctrl-C ends the test and prints what has been measured.
    The exit code is 1 if no request was answered.

    [bold]Examples[/bold]

        easyllm bench serve http://127.0.0.1:8420

        easyllm bench serve localhost:8420 --concurrency 8 --concurrency 32

        easyllm bench serve localhost:8420 --rate 0.5 --rate 1 --requests 100

        easyllm bench serve https://llm.example --data prompts.jsonl --json
    """
    from easyllm.core.errors import Interrupted
    from easyllm.serve.load_prompts import read_prompts
    from easyllm.serve.load_test import LoadTest

    options = checked_flags(LoadOptions, load, LOAD, source="load options")
    file = home_path(data)
    prompts = None if file is None else read_prompts(file, options.dialect)
    test = LoadTest(url, options, api_key=api_key, prompts=prompts)
    interrupted = _run(test)
    report = test.report()
    if json_output:
        print_json(report)
    else:
        _print(report, test)
    if interrupted:
        raise Interrupted("interrupted: these are the answers until then", signal.SIGINT)
    if not any(run["answered"] for run in report["runs"]):
        raise typer.Exit(1)


def _run(test: "LoadTest") -> bool:
    """Runs a test under a progress line; returns whether Ctrl-C ended it."""
    from easyllm.core.progress import Progress

    options = test.options
    total = options.requests * len(options.loads)
    with Progress("measuring", total=total, unit="request") as progress:
        test.on_answer = lambda load, _: progress.advance(1, load=str(load))
        try:
            asyncio.run(test.run())
        except KeyboardInterrupt:
            return True
    return False


def _print(report: JsonObject, test: "LoadTest") -> None:
    """Prints a table for each load, and one of all if there are several."""
    sys.stdout.write(f"{report['model']} at {report['url']}, {report['dialect']}\n")
    loads = [load for load, _ in test.runs]
    for load, run in zip(loads, report["runs"], strict=True):
        _print_run(str(load), run)
    if len(loads) > 1:
        _print_comparison(loads, report["runs"])
    for note in report["notes"]:
        sys.stdout.write(f"note: {note}\n")


def _print_run(title: str, run: JsonObject) -> None:
    rows = [
        (name, *(_time(run[key], quantile) for quantile in ("mean", "p50", "p95", "p99")))
        for key, name in LATENCIES.items()
    ]
    sys.stdout.write("\n")
    print_table(title, ("seconds", "mean", "p50", "p95", "p99"), rows)
    by_chunks = " (counted by chunks)" if run["tokens_counted_by"] == "chunks" else ""
    facts = {
        "answered": f"{run['answered']} in {run['seconds']:.1f} s, after "
        f"{run['warmup']} of warm-up",
        "requests/s": _rate(run["requests_per_s"]),
        "tokens/s": f"{_rate(run['output_tokens_per_s'])} of output, "
        f"{_rate(run['total_tokens_per_s'])} in all",
        "tokens each": f"{_span(run['prompt_tokens'])} of prompt, "
        f"{_span(run['output_tokens'])} of output{by_chunks}",
        "open": f"{run['mean_open_requests']:.1f} requests on average",
        "this client": f"{run['client_cpu_share']:.0%} of a core"
        + (f"; sent {_time(run['sent_late_s'], 'p99')} s late (p99)" if run["sent_late_s"] else ""),
    }
    if run["cached_tokens"]:
        facts["cached"] = f"{run['cached_tokens']} prompt tokens, in the server's prefix cache"
    if run["unanswered"]:
        facts["unanswered"] = f"{run['unanswered']} requests were still open"
    if run["without_text"]:
        facts["empty"] = f"{run['without_text']} answers had no text, and no first token"
    failed = [
        f"{each['count']} × {kind}" + (f": {each['example']}" if each["example"] else "")
        for kind, each in run["errors"].items()
    ]
    facts["errors"] = failed[0] if failed else "none"
    print_pairs(facts | {" " * number: line for number, line in enumerate(failed[1:], start=1)})


def _print_comparison(loads: list[Load], runs: list[JsonObject]) -> None:
    rows = [
        (
            load.clients or f"{load.rate:g}",
            _rate(run["requests_per_s"]),
            _rate(run["output_tokens_per_s"]),
            *(f"{_time(run[key], 'p50')} {_time(run[key], 'p99')}" for key in LATENCIES),
            sum(each["count"] for each in run["errors"].values()),
        )
        for load, run in zip(loads, runs, strict=True)
    ]
    heads = (name.replace(" ", "\n") for name in LATENCIES.values())
    load = "clients" if loads[0].clients else "rate"
    columns = (load, "req/s", "output\ntok/s", *heads, "errors")
    sys.stdout.write("\n")
    print_table("All loads: p50 and p99 in seconds", columns, rows)


def _time(found: JsonObject | None, quantile: str) -> str:
    return "-" if found is None else f"{found[quantile]:.3f}"


def _rate(value: float | None) -> str:
    """Returns a rate with three digits or more."""
    if value is None:
        return "?"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _span(found: JsonObject | None) -> str:
    """Returns a number of tokens, or its mean and range if it varies."""
    if found is None:
        return "an unknown number"
    if found["min"] == found["max"]:
        return str(found["min"])
    return f"{found['mean']:.1f} ({found['min']}-{found['max']})"
