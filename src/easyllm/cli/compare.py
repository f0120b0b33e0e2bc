"""The `easyllm compare` command."""

from typing import Annotated

import typer

from easyllm.cli.output import JsonFlag, print_json, print_pairs, print_table
from easyllm.cli.sampling import MaxTokens, RepetitionPenalty

SIDE_HELP = (
    "SOURCE[@VARIANT]: a model, optionally with float32, bfloat16, float16, float64, int8, int4 "
    "or transformers."
)


def register(app: typer.Typer) -> None:
    """Adds the `compare` command to `app`."""
    app.command("compare")(compare)


def compare(
    a: Annotated[str, typer.Argument(help=SIDE_HELP)],
    b: Annotated[str, typer.Argument(help=SIDE_HELP)],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text to continue; repeatable.")
    ] = None,
    max_tokens: MaxTokens = 64,
    repetition_penalty: RepetitionPenalty = 1.0,
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", help="Folder of an adapter to use with b.", metavar="FOLDER"),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Find the first token at which two models, dtypes or engines diverge, and by how much.

    [bold]Examples[/bold]

        easyllm compare smollm2 smollm2@bfloat16

        easyllm compare smollm2 smollm2@transformers --max-tokens 128

        easyllm compare smollm2 smollm2@int4 --prompt "The capital of France is" --json

        easyllm compare smollm2 runs/mine/adapter
    """
    from easyllm.verify.compare import PROMPTS, compare

    found = compare(
        a,
        b,
        tuple(prompt) if prompt else PROMPTS,
        max_tokens=max_tokens,
        repetition_penalty=repetition_penalty,
        adapter=adapter,
    )
    if json_output:
        print_json([comparison.as_dict() for comparison in found])
        return
    rows = []
    for each in found:
        parted = "never" if each.parts_at is None else str(each.parts_at)
        choices = ""
        if each.chosen_a and each.chosen_b:
            near = "near tie" if each.is_near_tie else "differ"
            gap = each.chosen_a.logprob_a - each.chosen_b.logprob_a
            choices = (
                f"{each.chosen_a.text!r} | {each.chosen_b.text!r} ({near}, {gap:.3f} nats apart)"
            )
        rows.append(
            (
                each.prompt if len(each.prompt) <= 32 else each.prompt[:31] + "…",
                parted,
                choices,
                f"{each.mean_kl_nats:.2e}",
                f"{each.max_logprob_difference:.2e}",
                f"{each.agreement:.1%}",
            )
        )
    titles = ("prompt", "diverges at", "a | b", "KL per token", "max |Δ logprob|", "same top-1")
    print_table(f"{a} (a) against {b} (b), greedy", titles, rows)
    same = sum(each.parts_at is None for each in found)
    print_pairs({"no divergence": f"{same} of {len(found)} prompts, {max_tokens} tokens each"})
