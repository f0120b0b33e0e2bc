"""The `easyllm lab` command: lists the labs, and runs one."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from easyllm.cli.output import JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from easyllm.lab.lab import Language

OUTPUT = Path("runs/labs")


def register(app: typer.Typer) -> None:
    """Adds the `lab` command to `app`."""
    app.command("lab")(lab)


def lab(
    name: Annotated[
        str | None, typer.Argument(help="Name of a lab; without it, all are listed.")
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Parameters of the lab; output=DIR is the folder of its files "
            "(by default runs/labs/NAME).",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: seconds instead of minutes.")
    ] = False,
    language: Annotated[
        str | None,
        typer.Option(help="Language of the page and the text, en or zh; by default that of LANG."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Run the experiment of a topic: numbers, a figure, a page, and what the article says.

    [bold]Examples[/bold]

        easyllm lab

        easyllm lab rope-distance

        easyllm lab rope-distance theta=500000 output=runs/theta --language zh
    """
    from easyllm.core.errors import ConfigError
    from easyllm.lab.catalogue import find_lab
    from easyllm.lab.lab import Text
    from easyllm.lab.page import PAGE_NAME, sentences
    from easyllm.lab.runner import check_lab, run_lab

    chosen = _language(language)
    if name is None:
        _list(chosen, json_output=json_output)
        return
    if "=" in name:
        raise ConfigError(f"{name!r} comes where the name of a lab is expected; write it first")
    found = find_lab(name)
    output, own = OUTPUT / name, list[str]()
    for word in words or ():
        if word.startswith("output="):
            output = Path(word.removeprefix("output=")).expanduser()
        else:
            own.append(word)
    check_lab(found, output, words=own, quick=quick)
    seconds = 1 if quick else found.seconds
    about = Text(f": about {seconds} s", f"：约 {seconds} 秒")
    sys.stderr.write(f"{found.title.of(chosen)}{about.of(chosen)}\n")
    done = run_lab(found, output, words=own, quick=quick, language=chosen)
    if json_output:
        print_json({**done.as_dict(), "folder": str(output)})
        return
    for claim in done.result.claims:
        sys.stdout.write("\n".join(sentences(claim, chosen)) + "\n")
    used = " ".join(f"{k}={v}" for k, v in done.parameters.model_dump(mode="json").items())
    sys.stdout.write(f"{Text('parameters: ', '参数：').of(chosen)}{used}\n")
    sys.stdout.write(f"{output / PAGE_NAME}\n")


def _language(named: str | None) -> "Language":
    """Returns the language of a flag, or of the environment.

    Raises:
        ConfigError: there is no text in this language.
    """
    from easyllm.core.errors import ConfigError

    if named is None:
        words = (os.environ.get(key, "") for key in ("LC_ALL", "LC_MESSAGES", "LANG"))
        return "zh" if next((w for w in words if w), "").startswith("zh") else "en"
    if named not in ("en", "zh"):
        raise ConfigError(f"--language {named} is not known; use en or zh")
    return "en" if named == "en" else "zh"


def _list(language: "Language", *, json_output: bool) -> None:
    from easyllm.lab.catalogue import all_labs

    found = all_labs().values()
    if json_output:
        print_json(
            [
                {"name": each.name, "rows": list(each.rows), "seconds": each.seconds}
                for each in found
            ]
        )
        return
    rows = [
        [each.chapter, each.name, each.title.of(language), f"{each.seconds} s"] for each in found
    ]
    print_table("Labs", ["chapter", "lab", "what it shows", "time"], rows)
