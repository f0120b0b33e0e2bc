"""`easyllm --version`: versions of the package, Python and torch, without importing torch."""

import sys

import typer

from easyllm import __version__


def print_version(requested: bool) -> None:
    """Prints the versions and exits, if the option was given."""
    if not requested:
        return
    import platform
    from importlib.metadata import PackageNotFoundError, version

    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "not installed"
    sys.stdout.write(f"easyllm {__version__} (python {platform.python_version()}, torch {torch})\n")
    raise typer.Exit
