"""Lazy exports: a package's names are imported from its modules when they are first used.

They make `import easyllm` and `easyllm --help` fast, because torch is not loaded.
"""

from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_exports(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """Returns the `__getattr__` of a package that imports its exported names on first use.

    Args:
        package: name of the package.
        modules: module that defines each exported name.

    Example:
        __getattr__ = lazy_exports(__name__, {"LLM": "easyllm.engine.llm"})
    """

    def load(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)

    return load


__all__ = ["lazy_exports"]
