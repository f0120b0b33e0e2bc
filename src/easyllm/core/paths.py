"""Paths as users write them: `~` is the user's home folder, in recipes as in a shell."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""A field of a configuration that contains a path."""


def expanded(path: str | Path) -> Path:
    """Returns a path with `~` expanded; unchanged if there is no such user.

    >>> expanded("runs/mine").as_posix()
    'runs/mine'
    """
    return Path(os.path.expanduser(path))


__all__ = ["PathText", "expanded"]
