"""The `easyllm doctor` command."""

import typer

from easyllm.cli.output import JsonFlag, print_json, print_pairs


def register(app: typer.Typer) -> None:
    """Adds the `doctor` command to `app`."""
    app.command("doctor")(doctor)


def doctor(json_output: JsonFlag = False) -> None:
    """Report what this machine can do: CPU, memory, devices, compiler, models.

    [bold]Examples[/bold]

        easyllm doctor

        easyllm doctor --json
    """
    from easyllm.core.device import cache_folder, describe_machine
    from easyllm.core.errors import SourceError
    from easyllm.core.manifest import versions
    from easyllm.models.sources import KNOWN_MODELS, locate

    report = describe_machine() | {"versions": versions(), "cache": str(cache_folder())}
    for name in KNOWN_MODELS:
        try:
            report[f"model {name}"] = str(locate(name))
        except SourceError as error:
            report[f"model {name}"] = str(error)
    if json_output:
        print_json(report)
        return
    shown = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in report.items()}
    shown["versions"] = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    print_pairs(shown)
