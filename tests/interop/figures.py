"""What a peer's script prints: versions, a line a figure, and whether each is within its bound."""

import sys
from collections.abc import Callable
from importlib.metadata import version


class Figures:
    """Collects the lines; `end` prints the summary and gives the exit status.

    Args:
        packages: whose versions are printed first.
    """

    def __init__(self, *packages: str) -> None:
        self.failed: list[str] = []
        self.count = 0
        versions = (f"{name} {version(name)}" for name in packages)
        print(", ".join((f"Python {sys.version.split()[0]}", *versions)), flush=True)

    def at_most(self, name: str, value: float, bound: float) -> None:
        """A difference and the bound that it must not pass; NaN passes every bound."""
        self._line(name, f"{value:.2e} (at most {bound:.0e})", value <= bound)

    def equal(self, name: str, got: object, expected: object) -> None:
        """Two values that must be the same."""
        same = got == expected
        text = f"{expected!r}" if same else f"got {got!r}, expected {expected!r}"
        self._line(name, text if len(text) < 90 or not same else "equal", same)

    def true(self, name: str, value: bool, text: str = "") -> None:
        """A statement that must hold."""
        self._line(name, text, value)

    def refused(self, name: str, action: Callable[[], object], *, names: str) -> None:
        """An action that must be refused by a message that holds `names`."""
        from easyllm.core.errors import EasyllmError

        try:
            action()
        except EasyllmError as error:
            self._line(name, str(error)[:160], names in str(error))
        else:
            self._line(name, "was accepted, expected a refusal", False)

    def run(self, name: str, action: Callable[[], None]) -> None:
        """Runs a group of figures; one that raises counts as failed and the next ones go ahead."""
        try:
            action()
        except Exception as error:  # whatever the peer raises is a result
            self._line(name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False)

    def end(self) -> int:
        """0 if every figure is right, else 1."""
        print(f"{self.count - len(self.failed)} of {self.count} right", flush=True)
        return 1 if self.failed else 0

    def _line(self, name: str, text: str, right: bool) -> None:
        self.count += 1
        if not right:
            self.failed.append(name)
        print(f"  {'ok  ' if right else 'FAIL'} {name:44} {text}".rstrip(), flush=True)


__all__ = ["Figures"]
