"""Entry point of the `easyllm` command: registers the commands and reports errors.

A user error is one sentence on standard error and exit code 2; `--debug` shows the traceback.
"""

import os
import signal
import sys
from contextlib import suppress
from typing import Annotated

import typer
from typer.core import TyperGroup

from easyllm.cli import (
    bench,
    compare,
    data,
    generate,
    machine,
    models,
    plan,
    run,
    schema,
    serve,
    tokenizer,
    train,
    verify,
)
from easyllm.cli.version import print_version
from easyllm.core.errors import EasyllmError, Interrupted


class _Commands(TyperGroup):
    """Reports Ctrl-C as `Interrupted`; typer would exit with 130 without a message."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        """Runs the command.

        Raises:
            Interrupted: Ctrl-C was pressed.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted", signal.SIGINT) from None


app = typer.Typer(
    name="easyllm",
    cls=_Commands,
    help="Train, align, evaluate and serve language models, from raw data to a chat server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (
    run,
    schema,
    data,
    tokenizer,
    models,
    plan,
    verify,
    compare,
    train,
    generate,
    serve,
    bench,
    machine,
):
    group.register(app)


@app.callback()
def _general_options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            help="Print the versions of easyllm, Python and torch, and exit.",
            callback=print_version,
            is_eager=True,
        ),
    ] = False,
    _debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Show the traceback of an error; accepted anywhere in a command, or "
            "EASYLLM_DEBUG=1.",
        ),
    ] = False,
) -> None:
    """Train, align, evaluate and serve language models, from raw data to a chat server."""


def main() -> None:
    """Entry point of the `easyllm` command."""
    debug = _take_debug() or bool(os.environ.get("EASYLLM_DEBUG"))
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # reports a full disk here instead of during interpreter shutdown
    except EasyllmError as error:
        if debug:
            raise
        sys.stderr.write(f"{error.label}{error}\n")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        _discard_output()
        sys.exit(141)
    except Exception as error:
        if debug:
            raise
        from easyllm.core.atomic import os_error_message

        sentence = os_error_message(error) if isinstance(error, OSError) else None
        if sentence is not None:
            sys.stderr.write(f"error: {sentence}\n")
            _discard_output()
            sys.exit(EasyllmError.exit_code)
        sys.stderr.write(
            f"internal error: {type(error).__name__}: {error}\n"
            "(run again with --debug for the traceback)\n"
        )
        sys.exit(1)


def _take_debug() -> bool:
    """Removes `--debug` from the command line, and returns whether it was there.

    Words after `--` are arguments, even if they begin with a dash.
    """
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options = [word for word in words[:end] if word != "--debug"]
    sys.argv = [*sys.argv[:1], *options, *words[end:]]
    return len(options) < end


def _discard_output() -> None:
    """Discards buffered standard output, which Python would otherwise flush again at exit."""
    with suppress(OSError, ValueError):  # not a file (captured output), or closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
