"""Errors that are reported to the user.

EasyllmError
├── ConfigError       a recipe or option is wrong
├── SourceError       a model, file or recipe cannot be found
├── CheckpointError   a weight file is damaged or does not fit
├── DataError         a data file or row is wrong
├── ContextLengthError  a prompt is too long (both a ConfigError and a DataError: the
│                       configuration or the data can be changed)
├── GateError         an exported model differs from what it was made from (exit status 1;
│                     in `verify.export_gate`)
├── Interrupted       a signal stopped the work (not an error of the user)
└── OutputError       a result cannot be written

Each message is one sentence: what is wrong, the value, what was expected, and what to do. The
command line prints the message and exits with status 2.
"""

import difflib
from collections.abc import Iterable
from typing import Self


class EasyllmError(ValueError):
    """Base class of errors that the user can fix; the message says how."""

    exit_code = 2
    """Exit status of the command line."""
    label = "error: "
    """What the command line prints before the message."""
    param: str | None = None
    """The invalid field of a request, if the error concerns a single field."""

    def about(self, param: str) -> Self:
        """Sets the field of a request that this error concerns, and returns the error."""
        self.param = param
        return self


class ConfigError(EasyllmError):
    """A recipe, option or combination of options is wrong."""


class SourceError(EasyllmError):
    """A model, file or recipe cannot be found."""


class CheckpointError(EasyllmError):
    """A weight file is damaged, or does not match the model that it is loaded into."""


class DataError(EasyllmError):
    """A data file or one of its rows cannot be used."""


class ContextLengthError(ConfigError, DataError):
    """A prompt, or a prompt plus the tokens to generate, does not fit into the context or KV cache.

    Args:
        what: what is too long, and the limit that it exceeds.
        remedy: what the owner of the process can do; a server sends its clients other advice.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what, self.remedy = what, remedy

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


class Interrupted(EasyllmError):
    """A signal stopped the work, as the user requested; the message says how to resume it.

    Attributes:
        signal: the signal number.
        exit_code: 128 plus the signal number.
    """

    label = ""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal, self.exit_code = number, 128 + number


class OutputError(EasyllmError):
    """A result cannot be written to the requested location."""


def install(extra: str) -> str:
    """Returns how to install the packages of an extra.

    Easyllm is installed from a clone, since no package index provides it yet.

    >>> install("data")
    "in your clone of Easyllm run: pip install '.[data]'"
    """
    return f"in your clone of Easyllm run: pip install '.[{extra}]'"


def read_failure(error: Exception) -> str:
    """Returns why a text file could not be read, without the error number and the path.

    >>> read_failure(FileNotFoundError(2, "No such file or directory", "a.txt"))
    'No such file or directory'
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns `" (did you mean 'x'?)"` for the closest known word, or an empty string.

    The word itself is never suggested.
    """
    others = [other for other in known if other != word]
    close = difflib.get_close_matches(word, others, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
