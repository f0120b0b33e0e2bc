"""The `easyllm quickstart` and `easyllm run` commands."""

import sys
from typing import Annotated

import typer

from easyllm.cli.next_steps import after_recipe, print_steps
from easyllm.cli.output import JsonFlag, Overrides, print_json, print_table
from easyllm.cli.serve import Port, start
from easyllm.core.json_types import JsonObject


def register(app: typer.Typer) -> None:
    """Adds the commands to `app`."""
    app.command("quickstart")(quickstart)
    app.command("run")(run)


def quickstart(
    overrides: Overrides = None,
    no_serve: Annotated[
        bool, typer.Option("--no-serve", help="Exit after the summary instead of serving.")
    ] = False,
    port: Port = 8420,
    json_output: JsonFlag = False,
) -> None:
    """Teach SmolLM2 new facts, compare it before and after, and chat with both models.

    Takes a few minutes on two CPU cores; a second run skips finished stages.

    [bold]Examples[/bold]

        easyllm quickstart

        easyllm quickstart --no-serve seed=1 output=runs/seed1
    """
    from easyllm.pipeline.quickstart import run_quickstart
    from easyllm.serve.run import bind

    serving = not no_serve and sys.stdin.isatty() and sys.stdout.isatty()
    if serving:
        bind("127.0.0.1", port).close()  # fail on a port in use now, not after the training
    result = run_quickstart(overrides or [])
    if json_output:
        print_json(result.summary)
    else:
        _show(result.summary)
    if serving:
        start({"base": "smollm2", "tuned": str(result.tuned)}, host="127.0.0.1", port=port)
    elif not json_output:
        print_steps(after_recipe(result.recipe, result.results))
        sys.stdout.write(f"\nthe page of serve is http://127.0.0.1:{port}/\n")


def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a built-in recipe.")],
    overrides: Overrides = None,
    json_output: JsonFlag = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Validate and print the resolved recipe; run nothing."),
    ] = False,
) -> None:
    """Run a pipeline recipe; finished stages are skipped, an interrupted run resumes.

    [bold]Examples[/bold]

        easyllm run quickstart

        easyllm run recipes/quickstart.yaml stages.tune.epochs=2 output=runs/two
    """
    from easyllm.core.yaml_text import dump_yaml
    from easyllm.pipeline import check_recipe, find_recipe, load_recipe, run_recipe

    loaded = load_recipe(find_recipe(recipe), overrides or [])
    if dry_run:
        plan = check_recipe(loaded)
        if json_output:
            print_json({"recipe": loaded.model_dump(mode="json"), **plan.as_dict()})
        else:
            sys.stdout.write(dump_yaml(loaded))
            sys.stderr.write("".join(f"{line}\n" for line in plan.waiting_lines()))
        return
    results = run_recipe(loaded)
    if json_output:
        print_json({name: r.figures | {"seconds": r.seconds} for name, r in results.items()})
        return
    rows = [
        (name, "skipped" if r.skipped else f"{r.seconds:.1f} s", r.product)
        for name, r in results.items()
    ]
    print_table(loaded.name, ("stage", "time", "result"), rows)
    print_steps(after_recipe(loaded, results))


def _show(summary: JsonObject) -> None:
    heldout, unrelated = summary["heldout_loss_nats"], summary["unrelated_loss_nats"]
    recall = summary["recall"]
    rows = [
        (
            "facts recalled (held-out phrasings)",
            f"{recall['before']:.0%}",
            f"{recall['after']:.0%}",
        ),
        ("loss on them, nats/token", f"{heldout['before']:.3f}", f"{heldout['after']:.3f}"),
        (
            "loss on unrelated questions",
            f"{unrelated['before']:.3f}",
            f"{unrelated['after']:.3f} ({unrelated['change_percent']:+.1f}%)",
        ),
    ]
    print_table("What the model learned", ("", "before", "after"), rows)
    answers = [(a["question"], a["before"], a["after"]) for a in summary["answers"]]
    print_table("Answers", ("question", "before", "after"), answers)
    speed = (
        f"{summary['train_steps']} steps at {summary['train_tokens_per_s']:.0f} tokens/s, "
        f"peak memory {summary['peak_rss_gb']} GB, {summary['total_seconds']:.0f} s in total"
    )
    sys.stdout.write(f"\n{speed}\n")
    for name, path in summary["paths"].items():
        sys.stdout.write(f"  {name:<8} {path}\n")
