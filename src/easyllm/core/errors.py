"""The errors a user can meet.

EasyllmError
├── ConfigError       a recipe or option is wrong
├── SourceError       a model, file or recipe cannot be found
├── CheckpointError   a weight file is damaged or does not fit
├── DataError         a data file or row is wrong
├── ContextLengthError  a prompt is too long (a ConfigError and a DataError: either can be changed)
└── OutputError       a result cannot be written

Each message says in one sentence: what, got, expected, what to do. The command line prints it and exits with 2.
"""

import difflib
from collections.abc import Iterable
from typing import Self


class EasyllmError(ValueError):
    """A mistake a user can mend; the message says how."""

    exit_code = 2
    """With which the command line ends."""
    param: str | None = None
    """The field of a request that is wrong, where one alone is."""

    def about(self, param: str) -> Self:
        """This error as one about a field of a request."""
        self.param = param
        return self


class ConfigError(EasyllmError):
    """A recipe, option or combination of options is wrong."""


class SourceError(EasyllmError):
    """A model, file or recipe cannot be found."""


class CheckpointError(EasyllmError):
    """A weight file is damaged, or does not fit the model it is read into."""


class DataError(EasyllmError):
    """A data file or one of its rows cannot be used."""


class ContextLengthError(ConfigError, DataError):
    """A prompt, or a prompt with what is to be generated, is longer than context or cache.

    Args:
        what: is too long, for what.
        remedy: what the owner of the process can do; a server's client is told another.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what, self.remedy = what, remedy

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


class OutputError(EasyllmError):
    """A result cannot be written where it was asked for."""


def install(extra: str) -> str:
    """What to run for the packages of an extra: an installation comes from a clone, as no package index has it yet.

    >>> install("data")
    "in your clone of Easyllm run: pip install '.[data]'"
    """
    return f"in your clone of Easyllm run: pip install '.[{extra}]'"


def suggest(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest known word, or an empty string; never the word itself."""
    others = [other for other in known if other != word]
    close = difflib.get_close_matches(word, others, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
