"""Entry point of the `easyllm` command: registers the commands and reports errors.

A user error is one sentence on standard error and exit code 2; `--debug` shows the traceback.
"""

import os
import sys
from contextlib import suppress

import typer

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

app = typer.Typer(
    name="easyllm",
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


def main() -> None:
    """Entry point of the `easyllm` command."""
    debug = "--debug" in sys.argv or bool(os.environ.get("EASYLLM_DEBUG"))
    sys.argv = [word for word in sys.argv if word != "--debug"]
    from easyllm.core.errors import EasyllmError

    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # reports a full disk here instead of during interpreter shutdown
    except EasyllmError as error:
        if debug:
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
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


def _discard_output() -> None:
    """Discards buffered standard output, which Python would otherwise flush again at exit."""
    with suppress(OSError, ValueError):  # not a file (captured output), or closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
