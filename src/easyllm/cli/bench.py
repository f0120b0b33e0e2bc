"""The `easyllm bench` command."""

from typing import Annotated

import typer

from easyllm.cli.bench_serve import serve
from easyllm.cli.models import Model
from easyllm.cli.options import Values, with_flags
from easyllm.cli.output import JsonFlag, print_json, print_pairs, print_table
from easyllm.cli.sampling import LOADING, load_llm

bench = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


def register(app: typer.Typer) -> None:
    """Adds the `bench` command group to `app`."""
    bench.command("serve")(serve)
    app.add_typer(bench, name="bench")


@bench.callback()
def _verbs() -> None:
    """Measure the speed of a model on this machine, or of a server.

    [bold]Examples[/bold]

        easyllm bench engine smollm2

        easyllm bench serve http://127.0.0.1:8420
    """


@bench.command("engine")
@with_flags
def engine(
    model: Model = "smollm2",
    *,
    loading: Annotated[Values, LOADING.only("quantize", "dtype", "cache_dtype")],
    repeats: Annotated[
        int, typer.Option(min=1, help="Runs per shape; the best one is reported.")
    ] = 3,
    json_output: JsonFlag = False,
) -> None:
    """Measure prefill and decoding rates, single and batched, against the machine's limits.

    The limits are the measured matmul throughput and memory read bandwidth.

    [bold]Examples[/bold]

        easyllm bench engine smollm2

        easyllm bench engine smollm2 --quantize int4 --json
    """
    from easyllm.engine.rates import measure_rates

    # prompts of different shapes share prefixes
    llm = load_llm(model, quiet=True, prefix_caching=False, **loading)
    rates, machine = measure_rates(llm, repeats=repeats)
    if json_output:
        print_json({"machine": machine, "rates": [each.as_dict() for each in rates]})
        return
    rows = [
        (
            each.sequences,
            each.prompt,
            each.new,
            f"{each.prefill_tokens_per_s:.0f}",
            f"{each.prefill_share:.0%}",
            f"{each.decode_tokens_per_s:.1f}",
            f"{each.read_share:.0%}",
            f"{each.matmul_share:.0%}",
            f"{each.first_token_s:.2f}",
        )
        for each in rates
    ]
    titles = (
        *("seqs", "prompt", "new", "prefill\ntok/s", "of\nmatmul"),
        *("decode\ntok/s", "of\nreads", "of\nmatmul", "first\ntoken, s"),
    )
    print_table(f"Engine rates of {model}", titles, rows)
    print_pairs(
        {
            "matmul": f"{machine['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s",
            "memory reads": f"{machine['read_bytes_per_s'] / 1e9:.1f} GB/s",
        }
    )
