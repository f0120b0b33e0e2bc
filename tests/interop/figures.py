"""Output of a peer's comparison: versions, and one line per figure with its bound."""

import sys
from collections.abc import Callable
from importlib.metadata import version


class Figures:
    """Prints one line per figure; `end` prints the summary and returns the exit status.

    Args:
        packages: packages whose versions are printed first.
    """

    def __init__(self, *packages: str) -> None:
        self.failed: list[str] = []
        self.count = 0
        versions = (f"{name} {version(name)}" for name in packages)
        print(", ".join((f"Python {sys.version.split()[0]}", *versions)), flush=True)

    def at_most(self, name: str, value: float, bound: float) -> None:
        """Records a difference and its upper bound; NaN exceeds every bound."""
        self._line(name, f"{value:.2e} (at most {bound:.0e})", value <= bound)

    def equal(self, name: str, got: object, expected: object) -> None:
        """Records two values that must be equal."""
        same = got == expected
        text = f"{expected!r}" if same else f"got {got!r}, expected {expected!r}"
        self._line(name, text if len(text) < 90 or not same else "equal", same)

    def true(self, name: str, value: bool, text: str = "") -> None:
        """Records a statement that must hold."""
        self._line(name, text, value)

    def refused(self, name: str, action: Callable[[], object], *, names: str) -> None:
        """Records an action that must be refused with a message that contains `names`."""
        from easyllm.core.errors import EasyllmError

        try:
            action()
        except EasyllmError as error:
            self._line(name, str(error)[:160], names in str(error))
        else:
            self._line(name, "was accepted, expected a refusal", False)

    def run(self, name: str, action: Callable[[], None]) -> None:
        """Runs a group of figures; an exception counts as one failure, and later groups run."""
        try:
            action()
        except Exception as error:  # any exception of the peer is a result
            self._line(name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False)

    def end(self) -> int:
        """Returns 0 if every figure is right, else 1."""
        print(f"{self.count - len(self.failed)} of {self.count} right", flush=True)
        return 1 if self.failed else 0

    def _line(self, name: str, text: str, right: bool) -> None:
        self.count += 1
        if not right:
            self.failed.append(name)
        print(f"  {'ok  ' if right else 'FAIL'} {name:44} {text}".rstrip(), flush=True)


__all__ = ["Figures"]
