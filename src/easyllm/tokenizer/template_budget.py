"""How much one rendering of a chat template may do: the counting and the measuring behind `template`."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

from easyllm.core.errors import DataError

MAX_SOURCE = 100_000
"""Longest template, in characters."""
MAX_STEPS = 500_000
"""Loop steps, calls, operators, filters and outputs one rendering may take."""
MAX_SECONDS = 1.0
"""CPU time one rendering may take."""
MAX_CHARS = 4_000_000
"""Size of a rendering and of any value in it: its characters, and ITEM_SIZE for each object it holds."""
MAX_TOTAL = 100_000_000
"""Size of all the values a rendering makes, together."""

ITEM_SIZE = 32
MAX_LETTERS = 100_000  # longest text taken apart into its letters
MAX_REASON = 1000  # longest message of a template's own
MAX_SEARCH = 100_000_000  # text times pattern, for methods that take as long as that
_HOLDERS: Any = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))


class TemplateError(DataError):
    """A chat template is broken, refuses its input, or does too much."""


class Visit(NamedTuple):
    """A loop of the template came to a message, or left the one it was at (`message` is None).

    Attributes:
        loop: which loop of the source.
        message: the message's number.
        position: characters written until then. What is held back (in a macro, say) is not yet written.
    """

    loop: int
    message: int | None
    position: int


class Budget:
    """Counts the work of one rendering, and notes where its loops came to a message.

    Args:
        messages: those that are rendered.
    """

    def __init__(self, messages: Sequence[Any] = ()) -> None:
        self.steps = 0
        self.total = 0
        self.deadline = time.thread_time() + MAX_SECONDS
        self.written = 0
        self.visits: list[Visit] = []
        self._messages = {id(message): number for number, message in enumerate(messages)}
        self._at: set[int] = set()

    def enter(self, loop: int, item: Any) -> None:
        """Notes that a loop came to the next item."""
        number = self._messages.get(id(item))
        if number is None:
            self.leave(loop)
        else:
            self._at.add(loop)
            self.visits.append(Visit(loop, number, self.written))

    def leave(self, loop: int) -> None:
        """Notes that a loop left the message it was at, if it was at one."""
        if loop in self._at:
            self._at.remove(loop)
            self.visits.append(Visit(loop, None, self.written))

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TemplateError(
                f"the chat template takes more than {MAX_STEPS} steps; use shorter input or another template"
            )
        if time.thread_time() > self.deadline:
            raise TemplateError(
                f"the chat template takes more than {MAX_SECONDS} s; use shorter input or another template"
            )

    def steps_of(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each counted as a step."""
        for item in items:
            self.step()
            yield item

    def made(self, value: Any) -> Any:
        """The value, measured; the values it holds were counted when they were made."""
        size = size_of(value)
        self.total += ITEM_SIZE * len(value) if isinstance(value, list | tuple | dict) else size
        if self.total > MAX_TOTAL:
            raise TemplateError(
                f"the chat template makes values of over {MAX_TOTAL} characters together; "
                "use shorter input or another template"
            )
        return value


BUDGET: ContextVar[Budget] = ContextVar("budget of the rendering that runs")


def check_replace(text: str, old: str, new: str) -> None:
    check_size(len(text) + text.count(old) * len(new))


def check_search(text: str, pattern: Any) -> None:
    if isinstance(pattern, str) and len(text) * len(pattern) > MAX_SEARCH:
        raise TemplateError("the chat template looks for too long a text")


def check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise TemplateError(f"the chat template makes a value over {MAX_CHARS} characters")


def size_of(value: Any) -> int:
    """Characters of a value and all it holds, what it holds twice counted twice, and ITEM_SIZE for each object.

    Raises:
        TemplateError: it is over MAX_CHARS.
    """
    size, found = 0, [value]
    while found:
        value = found.pop()
        size += ITEM_SIZE
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, int):
            size += value.bit_length() ** 2 // 64  # products take time in squares
        elif isinstance(value, dict):
            check_size(size + ITEM_SIZE * len(value))
            found += value.keys()
            found += value.values()
        elif isinstance(value, _HOLDERS):
            check_size(size + ITEM_SIZE * len(value))
            found += value
        check_size(size)
    return size
