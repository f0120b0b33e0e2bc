"""The `easyllm data` commands: build a corpus, inspect training samples."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from easyllm.cli.data_best_of_n import best_of_n
from easyllm.cli.data_chosen import chosen
from easyllm.cli.data_inspect import inspect
from easyllm.cli.data_passkey import passkey
from easyllm.cli.output import JsonFlag, Overrides, print_json, print_table
from easyllm.core.json_types import JsonObject

data_app = typer.Typer(
    no_args_is_help=True,
    help=r"""Build a corpus from raw files; inspect training samples.

    [bold]Examples[/bold]

        easyllm data build data-web 'sources.web.paths=\[crawl/*.jsonl.zst]'

        easyllm data inspect questions.jsonl --model smollm2
    """,
)
data_app.command("inspect")(inspect)
data_app.command("chosen")(chosen)
data_app.command("best-of-n")(best_of_n)
data_app.command("passkey")(passkey)


def register(app: typer.Typer) -> None:
    """Adds the `data` command group to `app`."""
    app.add_typer(data_app, name="data")


@data_app.command("build")
def build(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a built-in recipe.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan without running it.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    r"""Build packed tokens from raw files: clean, redact, decontaminate, deduplicate, mix, pack.

    An interrupted build resumes; finished stages are not repeated.

    [bold]Examples[/bold]

        easyllm data build data-web 'sources.web.paths=\[crawl/*.jsonl.zst]' --dry-run

        easyllm data build data-zh 'sources.web.paths=\[zh/]' tokenizer=runs/tok engine=ray
    """
    from easyllm.core.progress import format_count
    from easyllm.corpus.build import CorpusBuild
    from easyllm.corpus.config import load_corpus
    from easyllm.models import load_tokenizer
    from easyllm.pipeline import find_recipe

    config = load_corpus(find_recipe(recipe), overrides or [])
    work = CorpusBuild(config, load_tokenizer(config.tokenizer))
    plan = work.plan()
    if not json_output:
        rows = [
            (name, source["files"], f"{format_count(source['bytes'])}B", source["splits"])
            for name, source in plan.sources.items()
        ]
        print_table("Sources", ("source", "files", "size", "items"), rows)
        sys.stdout.write(f"stages: {' → '.join(plan.stages)}\n")
    if dry_run:
        if json_output:
            print_json(plan.as_dict())
        return
    summary = work.run()
    for warning in summary.get("warnings", ()):  # absent in corpora built by older versions
        sys.stderr.write(f"warning: {warning}\n")
    if json_output:
        print_json(summary)
        return
    _show(summary, Path(config.output))


def _show(summary: JsonObject, output: Path) -> None:
    from easyllm.corpus.report import (
        REMOVAL_COLUMNS,
        SOURCE_COLUMNS,
        headline,
        notes,
        removal_rows,
        source_rows,
    )

    if removed := removal_rows(summary):
        print_table("Removed", REMOVAL_COLUMNS, removed)
    print_table("Sources", SOURCE_COLUMNS, source_rows(summary))
    lines = [headline(summary), *(f"note: {note}" for note in notes(summary))]
    places = {"shards": "shards", "excluded": "excluded", "report": "report.md"}
    lines += [f"  {name:<9}{output / file}" for name, file in places.items()]
    sys.stdout.write("\n".join(lines) + "\n")
