"""`easyllm`: the verbs, and how errors reach a person.

A user's mistake is one sentence on standard error and exit code 2; `--debug` shows the traceback.
"""

import os
import sys

import typer

from easyllm.cli import (
    bench,
    compare,
    data,
    generate,
    machine,
    models,
    run,
    serve,
    tokenizer,
    train,
    verify,
)

app = typer.Typer(
    name="easyllm",
    help="A language model's whole life in one house: train, align, evaluate, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (
    run,
    data,
    tokenizer,
    models,
    verify,
    compare,
    train,
    generate,
    serve,
    bench,
    machine,
):
    group.register(app)


def main() -> None:
    """Entry point of the `easyllm` command."""
    debug = "--debug" in sys.argv or bool(os.environ.get("EASYLLM_DEBUG"))
    sys.argv = [word for word in sys.argv if word != "--debug"]
    from easyllm.core.errors import EasyllmError

    try:
        app()
    except EasyllmError as error:
        if debug:
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if debug:
            raise
        sys.stderr.write(
            f"internal error: {type(error).__name__}: {error}\n(run again with --debug for the traceback)\n"
        )
        sys.exit(1)
