"""Reading a JSON value (RFC 8259) as it arrives: checked character by character, passed on as text.

The reader keeps a stack of open brackets and never reads a character twice, so its time is linear
and its memory is bounded by the nesting.
"""

import json
import re
from enum import Enum, auto

from easyllm.tokenizer.tool_calls.source import Malformed, Sink, Source, Steps

MAX_DEPTH = 100
"""Maximum nesting of arrays and objects."""
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_HEX = re.compile(r"[0-9a-fA-F]{4}")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMBER_CHARACTERS = re.compile(r"[-+.0-9eE]+")


class _Next(Enum):
    """What may come next in a value."""

    VALUE = auto()
    VALUE_OR_END = auto()  # after "["
    KEY = auto()
    KEY_OR_END = auto()  # after "{"
    COMMA_OR_END = auto()


def read_value(source: Source, sink: Sink) -> Steps[None]:
    """Reads a value, passing its text on as it arrives; whitespace before it is not skipped.

    Raises:
        Malformed: the text is not JSON, or is nested deeper than MAX_DEPTH.
    """
    stack, state = list[str](), _Next.VALUE
    while True:
        character = yield from source.wait_for(1)
        if state in (_Next.VALUE_OR_END, _Next.KEY_OR_END, _Next.COMMA_OR_END) and (
            character and character == stack[-1]
        ):
            sink(source.take(1))
            stack.pop()
            state = _Next.COMMA_OR_END
        elif state is _Next.COMMA_OR_END:
            yield from _comma(source, sink)
            state = _Next.KEY if stack[-1] == "}" else _Next.VALUE
        elif state in (_Next.KEY, _Next.KEY_OR_END):
            yield from read_string(source, sink)
            yield from source.spaces(sink)
            sink((yield from source.expect(":")))
            state = _Next.VALUE
        elif character in ("{", "[") and character:
            if len(stack) == MAX_DEPTH:
                raise Malformed
            sink(source.take(1))
            stack.append("}" if character == "{" else "]")
            state = _Next.KEY_OR_END if character == "{" else _Next.VALUE_OR_END
        else:
            yield from _scalar(source, sink, character)
            state = _Next.COMMA_OR_END
        if not stack:
            return
        yield from source.spaces(sink)


def read_string(source: Source, sink: Sink) -> Steps[None]:
    """Reads a string with its quotation marks.

    Raises:
        Malformed: the text is not a JSON string.
    """
    sink((yield from source.expect('"')))
    while True:
        yield from source.run_of(_PLAIN, sink)
        mark = yield from source.expect('"', "\\")
        sink(mark)
        if mark == '"':
            return
        escaped = yield from source.wait_for(1)
        if not escaped or escaped not in '"\\/bfnrtu':
            raise Malformed
        length = 5 if escaped == "u" else 1
        whole = yield from source.wait_for(length)
        if length == 5 and not _HEX.fullmatch(whole[1:]):
            raise Malformed
        sink(source.take(length))


def string_value(literal: str) -> str:
    """Returns the value of a string literal."""
    value: str = json.loads(literal)
    return value


def _comma(source: Source, sink: Sink) -> Steps[None]:
    sink((yield from source.expect(",")))


def _scalar(source: Source, sink: Sink, character: str) -> Steps[None]:
    if character == '"':
        yield from read_string(source, sink)
    elif character and character in "tfn":
        sink((yield from source.expect("true", "false", "null")))
    else:
        parts = list[str]()

        def keep(part: str) -> None:
            parts.append(part)
            sink(part)

        yield from source.run_of(_NUMBER_CHARACTERS, keep)
        if not _NUMBER.fullmatch("".join(parts)):
            raise Malformed
