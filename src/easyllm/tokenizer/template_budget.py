"""Resource limits for rendering a chat template: counting steps and measuring values."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias

from easyllm.core.errors import DataError

TemplateValue: TypeAlias = Any
"""A value of Jinja, which declares no types for them."""
MAX_SOURCE = 100_000
"""Maximum length of a template, in characters."""
MAX_STEPS = 500_000
"""Maximum number of loop steps, calls, operators, filters and outputs per rendering."""
MAX_SECONDS = 1.0
"""Maximum CPU time per rendering, in seconds."""
MAX_CHARS = 4_000_000
"""Maximum size of a rendering and of any value in it: its characters plus ITEM_SIZE per object."""
MAX_TOTAL = 100_000_000
"""Maximum total size of all values created during a rendering."""

ITEM_SIZE = 32
MAX_SPLIT_CHARS = 100_000  # maximum length of a text that a filter splits into characters
MAX_REASON = 1000  # maximum length of an error message raised by a template
MAX_SEARCH = 100_000_000  # maximum of text length times pattern length, for methods of that cost
_HOLDERS: Any = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))


class TemplateError(DataError):
    """A chat template is invalid, rejects its input, or exceeds a resource limit."""


class Visit(NamedTuple):
    """An event: a template loop reached a message, or left its current one (`message` is None).

    Attributes:
        loop: index of the loop in the source.
        message: index of the message.
        position: number of characters written so far, not counting text that is still buffered (in
            a macro, for example).
    """

    loop: int
    message: int | None
    position: int


class Budget:
    """Counts the work of one rendering, and records when its loops reach a message.

    Args:
        messages: the messages that are rendered.
        disguise: characters that filters do not escape, because they stand for others.

    Attributes:
        steps: number of steps so far.
        total: total size of the values created so far.
        deadline: CPU time of the thread, in seconds, at which the rendering is stopped.
        written: number of characters written so far.
        disguise: characters that filters do not escape.
        visits: the recorded events.
    """

    def __init__(self, messages: Sequence[Any] = (), *, disguise: str = "") -> None:
        self.steps = 0
        self.total = 0
        self.deadline = time.thread_time() + MAX_SECONDS
        self.written = 0
        self.disguise = disguise
        self.visits: list[Visit] = []
        self._messages = {id(message): number for number, message in enumerate(messages)}
        self._at: set[int] = set()

    def enter(self, loop: int, item: object) -> None:
        """Records that a loop reached its next item."""
        number = self._messages.get(id(item))
        if number is None:
            self.leave(loop)
        else:
            self._at.add(loop)
            self.visits.append(Visit(loop, number, self.written))

    def leave(self, loop: int) -> None:
        """Records that a loop left its current message, if it was at one."""
        if loop in self._at:
            self._at.remove(loop)
            self.visits.append(Visit(loop, None, self.written))

    def step(self) -> None:
        """Counts one step.

        Raises:
            TemplateError: the rendering exceeds MAX_STEPS or MAX_SECONDS.
        """
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TemplateError(
                f"the chat template takes more than {MAX_STEPS} steps; "
                "use shorter input or another template"
            )
        if time.thread_time() > self.deadline:
            raise TemplateError(
                f"the chat template takes more than {MAX_SECONDS} s; "
                "use shorter input or another template"
            )

    def steps_of(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yields the items, counting each as a step."""
        for item in items:
            self.step()
            yield item

    def made(self, value: object) -> TemplateValue:
        """Adds the size of a new value to the total and returns the value.

        The items of a container were counted when they were created.

        Raises:
            TemplateError: the value exceeds MAX_CHARS, or the total exceeds MAX_TOTAL.
        """
        size = size_of(value)
        self.total += ITEM_SIZE * len(value) if isinstance(value, list | tuple | dict) else size
        if self.total > MAX_TOTAL:
            raise TemplateError(
                f"the chat template creates values of more than {MAX_TOTAL} characters in total; "
                "use shorter input or another template"
            )
        return value


BUDGET: ContextVar[Budget] = ContextVar("budget of the current rendering")
"""The budget of the current rendering."""


def check_replace(text: str, old: str, new: str) -> None:
    """Raises a `TemplateError` if `text.replace(old, new)` would exceed MAX_CHARS."""
    check_size(len(text) + text.count(old) * len(new))


def check_search(text: str, pattern: object) -> None:
    """Raises a `TemplateError` if searching `text` for `pattern` would take too long."""
    if isinstance(pattern, str) and len(text) * len(pattern) > MAX_SEARCH:
        raise TemplateError(
            "the chat template searches for a pattern that is too long; "
            "use shorter input or another template"
        )


def check_size(size: int) -> None:
    """Raises a `TemplateError` if `size` exceeds MAX_CHARS."""
    if size > MAX_CHARS:
        raise TemplateError(
            f"the chat template creates a value of more than {MAX_CHARS} characters; "
            "use shorter input or another template"
        )


def size_of(value: object) -> int:
    """Returns the size of a value: its characters plus ITEM_SIZE per object, recursively.

    An object that is contained twice counts twice.

    Raises:
        TemplateError: the size exceeds MAX_CHARS.
    """
    size, found = 0, [value]
    while found:
        value = found.pop()
        size += ITEM_SIZE
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, int):
            size += value.bit_length() ** 2 // 64  # multiplying integers takes quadratic time
        elif isinstance(value, dict):
            check_size(size + ITEM_SIZE * len(value))
            found += value.keys()
            found += value.values()
        elif isinstance(value, _HOLDERS):
            check_size(size + ITEM_SIZE * len(value))
            found += value
        check_size(size)
    return size
