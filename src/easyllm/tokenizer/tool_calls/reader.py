"""Reading one output: the calls in it, as pieces."""

from collections.abc import Callable
from dataclasses import dataclass, field

from easyllm.core.json_types import JsonMapping
from easyllm.tokenizer.tool_calls.pieces import CallArguments, CallEnd, CallStart, Piece
from easyllm.tokenizer.tool_calls.source import Malformed, Source, Steps
from easyllm.tokenizer.tool_calls.tools import Tool


@dataclass(slots=True)
class Calls:
    """The calls of an output while they are read.

    Attributes:
        source: the output.
        tools: the declared tools by name; empty if any name is a tool's.
        emit: receives the pieces.
        is_open: whether a call has begun and not ended.
        count: number of calls that have begun.
        schema: JSON Schema of the arguments of the last call that has begun.
    """

    source: Source
    tools: dict[str, Tool]
    emit: Callable[[Piece], None]
    is_open: bool = False
    count: int = 0
    schema: JsonMapping = field(default_factory=dict)

    def knows(self, name: str) -> bool:
        """Whether a tool has this name."""
        return name in self.tools if self.tools else bool(name)

    def may_know(self, beginning: str) -> bool:
        """Whether the name of a tool, and whitespace after it, may begin in this way."""
        return not self.tools or any(name.startswith(beginning.rstrip()) for name in self.tools)

    def start(self, name: str) -> None:
        """Begins a call.

        Raises:
            Malformed: there is no such tool.
        """
        if not self.knows(name):
            raise Malformed
        self.source.stop_recording()
        self.is_open = True
        self.count += 1
        self.schema = self.tools[name].schema if name in self.tools else {}
        self.emit(CallStart(self.count - 1, name))

    def argue(self, text: str) -> None:
        """Continues the arguments of the call."""
        self.emit(CallArguments(self.count - 1, text))

    def end(self, *, complete: bool = True) -> None:
        """Ends the call."""
        self.is_open = False
        self.emit(CallEnd(self.count - 1, complete))


MAX_NAME = 256
"""Maximum length in characters of a tool's name with what surrounds it, and of a parameter's."""


def read_up_to(
    source: Source, end: str, accepts: Callable[[str], bool] | None = None
) -> Steps[str]:
    """Reads up to one of the characters `end`, which stays unread.

    Args:
        source: the output.
        end: characters that end the text.
        accepts: whether the text may begin in this way.

    Raises:
        Malformed: the text is longer than MAX_NAME, is not accepted, or does not end.
    """
    text = ""
    while True:
        character = yield from source.wait_for(1)
        if not character or len(text) > MAX_NAME:
            raise Malformed
        if character in end:
            return text
        if accepts is not None and not accepts(text + character):
            raise Malformed
        text += source.take(1)
