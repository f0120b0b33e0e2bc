"""The `easyllm prompt` commands: structured prompts."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from easyllm.cli.output import JsonFlag, home_path, print_json, print_table
from easyllm.core.errors import ConfigError

prompt_app = typer.Typer(
    no_args_is_help=True,
    help="""Write, check and fill structured prompts.

    Their sections are those of LangGPT or CRISPE.

    [bold]Examples[/bold]

        easyllm prompt new mine.md --from translator

        easyllm prompt lint mine.md --model smollm2

        easyllm prompt render mine.md Source=English Target=French
    """,
)
Source = Annotated[
    str, typer.Argument(metavar="NAME|FILE", help="A prompt of the package, or a .md file.")
]
Variables = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME=VALUE]...", help="Values of the variables <NAME>."),
]


def register(app: typer.Typer) -> None:
    """Adds the `prompt` command group to `app`."""
    app.add_typer(prompt_app, name="prompt")


@prompt_app.command("new")
def new(
    file: Annotated[
        Path | None,
        typer.Argument(callback=home_path, help="New .md file; without one, the list of prompts."),
    ] = None,
    start: Annotated[
        str, typer.Option("--from", metavar="NAME", help="The prompt to begin with.")
    ] = "assistant",
) -> None:
    """Write a new prompt file from one in the package, to be edited.

    [bold]Examples[/bold]

        easyllm prompt new

        easyllm prompt new mine.md --from solver-zh
    """
    from easyllm.core.atomic import atomic_file
    from easyllm.prompt.library import load_prompt, prompt_names, read_prompt_text

    if file is None:
        rows = []
        for name in prompt_names():
            prompt = load_prompt(name)
            variables = " ".join(f"<{each}>" for each in prompt.variables)
            rows.append((name, prompt.role or "CRISPE", variables))
        print_table("Prompts", ("name", "role", "variables"), rows)
        return
    if file.suffix != ".md":
        raise ConfigError(f"{str(file)!r} does not end in .md; give a Markdown file")
    text = read_prompt_text(start)
    with atomic_file(file) as work:
        work.write_text(text, encoding="utf-8")
    sys.stdout.write(f"wrote {file}; check it with easyllm prompt lint {file}\n")


@prompt_app.command("lint")
def lint_prompt(
    source: Source,
    values: Variables = None,
    model: Annotated[
        str | None, typer.Option(help="A model, whose tokenizer counts the prompt's tokens.")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Find missing sections, unresolved variables and mixed markers; exit code 1 if there are any.

    [bold]Examples[/bold]

        easyllm prompt lint mine.md

        easyllm prompt lint translator Source=English Target=French --model smollm2 --json
    """
    from easyllm.prompt.library import read_prompt_text
    from easyllm.prompt.lint import lint

    text = read_prompt_text(source)
    faults = lint(text, _variables(values))
    tokens = _tokens(model, text) if model is not None else None
    if json_output:
        found = [{"rule": f.rule, "line": f.line, "message": f.message} for f in faults]
        print_json({"faults": found, "characters": len(text), "tokens": tokens})
    else:
        for fault in faults:
            where = f"{source}:{fault.line}" if fault.line else source
            sys.stdout.write(f"{where}: {fault.message} ({fault.rule})\n")
        count = "" if tokens is None else f", {tokens['markdown']} tokens ({tokens['flat']} flat)"
        sys.stdout.write(f"{len(faults)} faults, {len(text)} characters{count}\n")
    if faults:
        raise typer.Exit(1)


@prompt_app.command("render")
def render_prompt(
    source: Source,
    values: Variables = None,
    flat: Annotated[
        bool, typer.Option("--flat", help="Without headings, for models that read them badly.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Print a prompt with its variables filled, as a system message.

    [bold]Examples[/bold]

        easyllm prompt render translator Source=English Target=French

        easyllm prompt render assistant-zh --flat
    """
    from easyllm.prompt.library import load_prompt
    from easyllm.prompt.structured import render

    text = render(load_prompt(source), _variables(values), form="flat" if flat else "markdown")
    if json_output:
        print_json({"role": "system", "content": text.strip()})
    else:
        sys.stdout.write(text)


def _variables(words: list[str] | None) -> dict[str, str]:
    """Returns the values of `NAME=VALUE` words.

    Raises:
        ConfigError: a word has no `=`.
    """
    found = {}
    for word in words or ():
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigError(f"{word!r} is not a value of a variable; write NAME=VALUE")
        found[name] = value
    return found


def _tokens(model: str, text: str) -> dict[str, int]:
    """Returns the number of tokens of a prompt in both forms."""
    from easyllm.models import load_tokenizer
    from easyllm.prompt.structured import parse, to_flat

    tokenizer = load_tokenizer(model)
    forms = {"markdown": text, "flat": to_flat(parse(text))}
    return {name: len(tokenizer.encode(each, special_tokens=False)) for name, each in forms.items()}
