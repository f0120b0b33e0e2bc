"""Splitting an output into reasoning, text and tool calls as it arrives."""

import re
from collections.abc import Iterable, Iterator

from easyllm.tokenizer.reasoning import ReasoningFormat
from easyllm.tokenizer.tool_calls.base import ToolFormat
from easyllm.tokenizer.tool_calls.pieces import Piece, ReasoningPiece, TextPiece, merged
from easyllm.tokenizer.tool_calls.reader import Calls
from easyllm.tokenizer.tool_calls.source import WHITESPACE, Malformed, Marks, Sink, Source, Steps
from easyllm.tokenizer.tool_calls.tools import ToolDefinitions, declared

_NEWLINES = re.compile(r"[\r\n]+")


class OutputParser:
    """Splits the text of an output into pieces; the division of the text does not matter.

    The text is that of all tokens, with the names of special tokens. These are removed from text
    and reasoning, and so are newlines around the reasoning and whitespace between calls. Text that
    may be the beginning of a mark is held back until it is known. What looks like a call but is
    not one, or calls no declared tool, is text.

    Args:
        format: the format of the tool calls; None to look for none.
        reasoning: the format of the reasoning; None to look for none.
        starts_in_reasoning: whether the prompt has opened the reasoning.
        tools: the declared tools.
        special_names: the names of the tokenizer's special tokens.

    Raises:
        DataError: the tools are malformed (see `tools.declared`).

    Example:
        parser = OutputParser(tokenizer.tool_format, tokenizer.reasoning, tools=tools)
        for event in events:
            send(parser.push(event.text))
        send(parser.finish())
    """

    def __init__(
        self,
        format: ToolFormat | None,
        reasoning: ReasoningFormat | None,
        *,
        starts_in_reasoning: bool = False,
        tools: ToolDefinitions = (),
        special_names: Iterable[str] = (),
    ) -> None:
        self._format, self._reasoning = format, reasoning
        self._pieces = list[Piece]()
        self._source = Source()
        self._calls = Calls(self._source, declared(tools), self._pieces.append)
        names = frozenset(special_names)
        self._names = names
        self._written = re.compile("|".join(map(re.escape, sorted(names, key=len)[::-1])) or "(?!)")
        self._marks = Marks([*names, *(() if format is None else format.triggers)])
        self._answer = _Spaced(
            lambda text: self._pieces.append(TextPiece(text)),
            "" if format is None else WHITESPACE,
        )
        self._steps: Iterator[None] = self._run(starts_in_reasoning)
        next(self._steps)

    def push(self, text: str) -> list[Piece]:
        """Adds text, and returns the pieces that it completes."""
        self._source.push(text)
        next(self._steps)
        return self._take()

    def finish(self) -> list[Piece]:
        """Returns the last pieces; the text is complete."""
        self._source.ended = True
        for _ in self._steps:
            raise AssertionError("nothing waits for more text at its end")
        return self._take()

    def _take(self) -> list[Piece]:
        pieces = merged(self._pieces)
        self._pieces.clear()
        return pieces

    def _run(self, in_reasoning: bool) -> Steps[None]:
        yield  # the text that `push` adds
        if self._reasoning is not None:
            yield from self._read_reasoning(self._reasoning, in_reasoning)
        if self._format is not None and self._format.at_start:
            yield from self._source.spaces(self._answer.hold)
            yield from self._try_call(self._format, "")
        while True:
            mark = yield from self._source.until(self._marks, self._text)
            if self._format is not None and mark in self._format.triggers:
                yield from self._try_call(self._format, mark)
            elif not mark:
                break
        if not self._calls.count:
            self._answer.flush()

    def _text(self, text: str) -> None:
        """Passes on text of the answer."""
        self._answer.add(text, is_after_call=self._calls.count > 0)

    def _try_call(self, format: ToolFormat, trigger: str) -> Steps[None]:
        """Reads a group of calls; what is not a call becomes text."""
        source, calls, count = self._source, self._calls, self._calls.count
        source.start_recording()
        try:
            yield from format.read(calls, trigger)
            source.stop_recording()
        except Malformed:
            if calls.is_open:
                calls.end(complete=False)
                return
            read = source.stop_recording()
            self._text(self._written.sub("", read if calls.count > count else trigger + read))

    def _read_reasoning(self, reasoning: ReasoningFormat, is_open: bool) -> Steps[None]:
        source = self._source
        if not is_open:
            yield from source.spaces(self._answer.hold)
            if not (yield from source.optional(reasoning.open)):
                return
            self._answer.drop()
        yield from source.run_of(_NEWLINES)
        thoughts = _Spaced(lambda text: self._pieces.append(ReasoningPiece(text)), "\r\n")
        marks = Marks([reasoning.close, *self._names])
        while True:
            mark = yield from source.until(marks, thoughts.add)
            if not mark:
                thoughts.flush()
                return
            if mark == reasoning.close:
                yield from source.run_of(_NEWLINES)
                return


class _Spaced:
    """Passes text on without the whitespace at its end, which is held back.

    Args:
        sink: receives the text.
        characters: the whitespace that is held back.
    """

    def __init__(self, sink: Sink, characters: str = WHITESPACE) -> None:
        self._sink, self._characters = sink, characters
        self._held = ""
        self._has_text = False

    def hold(self, spaces: str) -> None:
        """Adds whitespace."""
        self._held += spaces

    def drop(self) -> None:
        """Drops the whitespace that is held back."""
        self._held = ""

    def add(self, text: str, *, is_after_call: bool = False) -> None:
        """Adds text; whitespace between calls and the first text is dropped."""
        core = text.rstrip(self._characters)
        if core:
            if is_after_call and not self._has_text:
                self._held, core = "", core.lstrip(self._characters)
            self._sink(self._held + core)
            self._has_text = True
            self._held = ""
        self._held += text[len(text.rstrip(self._characters)) :]

    def flush(self) -> None:
        """Passes on the whitespace that is held back."""
        self._sink(self._held)
        self._held = ""
