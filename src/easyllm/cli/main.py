"""Entry point of the `easyllm` command: finds the commands and reports errors.

A user error is one sentence on standard error and exit code 2; `--debug` shows the traceback.
"""

import io
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Annotated

import typer
from typer.core import TyperGroup

from easyllm.cli.version import print_version
from easyllm.core.errors import EasyllmError, Interrupted
from easyllm.core.garbage import importing
from easyllm.parallel.failures import record_error


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


COMMANDS: dict[str, dict[str, str]] = {
    "run": {
        "quickstart": "Teach SmolLM2 new facts, compare it before and after, and chat with both "
        "models.",
        "run": "Run a pipeline recipe; finished stages are skipped, an interrupted run resumes.",
    },
    "schema": {
        "schema": "Print the JSON Schema of a recipe or request, with descriptions, for editors.",
    },
    "data": {
        "data": "Build a corpus from raw files; inspect training samples.",
    },
    "tokenizer": {
        "tokenizer": "Train a tokenizer, compare several, extend a model's, import from "
        "sentencepiece.",
    },
    "models": {
        "pull": "Download a known model into the cache (its SHA-256 is pinned).",
        "convert": "Convert a model to a Hugging Face folder that transformers, vLLM and "
        "others can load.",
    },
    "merge": {
        "merge": "Merge an adapter into its base model, and compare the result with the adapter.",
    },
    "quantize": {
        "quantize": "Quantize a model to a file that other programs read, and measure what it "
        "costs.",
    },
    "plan": {
        "plan": "Estimate parameters, memory, FLOPs and time of a model or training run "
        "without loading it.",
    },
    "dtype": {
        "dtype": "Show how a number is stored in a format, or what casting a model's weights "
        "loses.",
    },
    "verify": {
        "verify": "Check numerical equalities that must hold for a checkpoint or recipe; exit code "
        "1 if not.",
    },
    "probe": {
        "probe": "Look inside a model: what its layers contribute, predict and recall, and miss if "
        "removed.",
    },
    "compare": {
        "compare": "Find the first token at which two models, dtypes or engines diverge, and "
        "by how much.",
    },
    "train": {
        "train": "Train with a recipe; an interrupted run resumes.",
    },
    "rl": {
        "rl": "Look into reinforcement learning: why a run does not learn, and a small gridworld.",
    },
    "evaluate": {
        "eval": "Measure a model: tasks, loss and recall, perplexity, win rate against another "
        "model, Elo.",
    },
    "prompt": {
        "prompt": "Write, check and fill structured prompts.",
    },
    "reason": {
        "reason": "Let a model reason before it answers: step by step, by vote, in parts, as a "
        "tree.",
    },
    "embed": {
        "embed": "Train word and sentence embeddings, and search with them.",
    },
    "rag": {
        "rag": "Answer questions from documents: index them, search, cite.",
    },
    "generate": {
        "generate": "Continue a prompt, printing the text as it is generated.",
        "chat": "Chat with a model in the terminal; an empty line or Ctrl-D quits.",
    },
    "serve": {
        "serve": "Serve models over the APIs of OpenAI and Anthropic, with a chat page.",
    },
    "bench": {
        "bench": "Measure the speed of a model on this machine, or of a server.",
    },
    "lab": {
        "lab": "Run the experiment of a topic: numbers, a figure, a page, and what the article "
        "says.",
    },
    "machine": {
        "doctor": "Report what this machine can do: CPU, memory, devices, compiler, models.",
    },
}
"""The commands of each module of `cli`, with their first sentences: what `easyllm --help` shows."""
OFF = ("", "0", "false", "no", "off")
"""Values of EASYLLM_DEBUG that mean no."""


def build_app(modules: Iterable[str] = ()) -> typer.Typer:
    """Returns the command-line application with the commands of some modules of `cli`.

    Only these modules are imported. Without any, the commands have their first sentence only, which
    is all that `easyllm --help` shows.
    """
    app = typer.Typer(
        name="easyllm",
        cls=_Commands,
        help="Train, evaluate and serve language models, from raw data to a chat server.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_general_options)
    listed = tuple(modules)
    for name in listed:
        import_module(f"easyllm.cli.{name}").register(app)
    for commands in COMMANDS.values() if not listed else ():
        for command, sentence in commands.items():
            app.command(command, help=sentence)(_not_loaded)
    return app


def app_for(words: Sequence[str]) -> typer.Typer:
    """Returns the application with as few commands as a command line needs.

    Args:
        words: the command line without the program's name.
    """
    first = next((word for word in words if not word.startswith("-")), None)
    if first is None:
        return build_app()
    module = next((name for name, commands in COMMANDS.items() if first in commands), None)
    return build_app() if module is None else build_app([module])  # an unknown one is refused


def __getattr__(name: str) -> typer.Typer:
    """Returns `app`, the application with all commands; built when it is first used."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    app = build_app(COMMANDS)
    globals()["app"] = app
    return app


def _not_loaded() -> None:
    """Stands for a command in a list."""
    raise AssertionError("commands that run are loaded")


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
    """Train, evaluate and serve language models, from raw data to a chat server."""


def main() -> None:
    """Entry point of the `easyllm` command."""
    debug = _take_debug() or os.environ.get("EASYLLM_DEBUG", "").lower() not in OFF
    _print_any_character()
    try:
        try:
            with importing():
                app = app_for(sys.argv[1:])
            _run(app)
        finally:
            sys.stdout.flush()  # reports a full disk here instead of during interpreter shutdown
    except EasyllmError as error:
        if not record_error(error):  # else the launcher of the ranks prints it
            if debug:
                traceback.print_exc()
            sys.stderr.write(f"{error.label}{error}\n")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        _discard_output()
        sys.exit(141)
    except Exception as error:
        if record_error(error):
            sys.exit(1)
        if debug:
            traceback.print_exc()
        from easyllm.core.atomic import os_error_message

        sentence = os_error_message(error) if isinstance(error, OSError) else None
        if sentence is not None:
            sys.stderr.write(f"error: {sentence}\n")
            _discard_output()
            sys.exit(EasyllmError.exit_code)
        hint = "" if debug else "(run again with --debug for the traceback)\n"
        sys.stderr.write(f"internal error: {type(error).__name__}: {error}\n{hint}")
        sys.exit(1)


def _run(app: typer.Typer) -> None:
    """Runs the application and exits.

    Raises:
        ConfigError: the command line has an unknown option, or a value that cannot be.
    """
    try:
        code = app(prog_name="easyllm", standalone_mode=False)
    except typer.Abort:
        sys.exit(1)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # typer has printed the help
            sys.exit(EasyllmError.exit_code)
        from easyllm.cli.usage import usage_error

        found = usage_error(error, sys.argv[1:])
        if found is None:
            raise
        raise found from error
    sys.exit(code if isinstance(code, int) else 0)


def _print_any_character() -> None:
    """Lets characters that the terminal's encoding lacks be printed as escapes, not as errors."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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
