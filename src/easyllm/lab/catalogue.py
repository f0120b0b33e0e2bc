"""The labs by name, found in the folder `labs`."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from easyllm.core.errors import SourceError, suggest
from easyllm.lab import labs as folder
from easyllm.lab.lab import CHAPTERS, Lab


@cache
def all_labs() -> dict[str, Lab]:
    """Returns all labs by name, in the order of chapters and rows."""
    modules = [import_module(f"{folder.__name__}.{m.name}") for m in iter_modules(folder.__path__)]
    found: list[Lab] = [module.LAB for module in modules]
    found.sort(key=lambda lab: (CHAPTERS.index(lab.chapter), lab.rows, lab.name))
    return {lab.name: lab for lab in found}


def find_lab(name: str) -> Lab:
    """Returns a lab.

    Raises:
        SourceError: there is no such lab.
    """
    known = all_labs()
    if name in known:
        return known[name]
    chapter = [lab.name for lab in known.values() if lab.chapter == name]
    if chapter:
        raise SourceError(f"{name!r} is a chapter; name one of its labs: {', '.join(chapter)}")
    raise SourceError(
        f"there is no lab {name!r}{suggest(name, known)}; `easyllm lab` lists all {len(known)}"
    )


__all__ = ["all_labs", "find_lab"]
