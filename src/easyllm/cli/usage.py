"""Command lines that cannot be parsed: the message of typer as one sentence."""

import re
from collections.abc import Sequence

from easyllm.core.errors import ConfigError


def usage_error(error: Exception, words: Sequence[str] = ()) -> ConfigError | None:
    """Returns the error to report for one that typer raised; None if typer did not raise it.

    typer's own report has a line of usage and a box, and leaves out the value that it refuses.

    Args:
        error: what running the application raised.
        words: the command line without the program's name.
    """
    told = getattr(error, "format_message", None)
    if told is None:
        return None
    message = _refused_value(error) or str(told()).rstrip(". \n")
    message = " ".join(message.split())
    if near := getattr(error, "possibilities", None):
        message = f"{message.partition(' (')[0]} (did you mean {' or '.join(sorted(near))}?)"
    context, command = getattr(error, "ctx", None), "easyllm"
    if context is not None:
        command = context.command_path
    elif words and not words[0].startswith("-"):
        command += f" {words[0]}"
    return ConfigError(f"{message[:1].lower()}{message[1:]}; see {command} --help")


def _refused_value(error: Exception) -> str:
    """Describes the flag, its value and what was expected; empty if no value was refused."""
    found = getattr(error.__cause__, "errors", None)
    param = getattr(error, "param", None)
    if found is None or param is None:
        return ""
    first = found()[0]
    name = param.opts[0] if param.param_type_name == "option" else param.human_readable_name
    message, got = str(first["msg"]), str(first["input"])
    got = got if re.fullmatch(r"[\w.+-]+", got) else repr(got)
    return f"{name} {got}: {message[:1].lower()}{message[1:]}"


__all__ = ["usage_error"]
