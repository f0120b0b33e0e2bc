"""Tool calls as JSON objects with a name and arguments, alone or in a list.

    <tool_call>                                                      Hermes, Qwen2.5, Qwen3
    {"name": "add", "arguments": {"a": 1}}
    </tool_call>
    {"name": "add", "parameters": {"a": 1}}                          Llama 3.1 and later
    [TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]            Mistral until v7
    functools[{"name": "add", "arguments": {"a": 1}}]                Phi-4-mini

The reader accepts more than the grammar writes: any whitespace and order of keys, arguments as a
string of JSON, a list where an object is usual, and calls without their closing mark.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from easyllm.tokenizer.tool_calls.base import ToolFormat
from easyllm.tokenizer.tool_calls.json_reader import read_string, read_value, string_value
from easyllm.tokenizer.tool_calls.lark import Lark, pattern_of, quoted
from easyllm.tokenizer.tool_calls.reader import Calls
from easyllm.tokenizer.tool_calls.source import Malformed, Source, Steps
from easyllm.tokenizer.tool_calls.tools import Tool

_ARGUMENTS = ("arguments", "parameters")
_ID_KEY = ', "id": '
_ID = r'"[a-zA-Z0-9]{9}"'


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonStyle:
    """How a model writes calls as JSON objects.

    Attributes:
        opening: the mark before a group of calls.
        closing: the mark after it.
        begin, end: what is written between the marks and the calls, with the brackets of a list.
        separator: what is written between the calls of a group.
        key: the key of the arguments.
        at_start: whether calls begin without the mark at the start of the answer.
        repeats: as in `ToolFormat`.
        has_ids: whether an `id` of nine letters or digits may follow the arguments.
    """

    opening: str = ""
    closing: str = ""
    begin: str = ""
    end: str = ""
    separator: str = ", "
    key: str = "arguments"
    at_start: bool = False
    repeats: str | None = None
    has_ids: bool = False


class JsonObjects(ToolFormat):
    """A format of calls as JSON objects.

    Args:
        name: name of the format.
        style: how the calls are written.
        added: ids of the tokenizer's added tokens by their names.
    """

    def __init__(self, name: str, style: JsonStyle, added: Mapping[str, int]) -> None:
        super().__init__(added)
        self.name, self._style = name, style
        self.opening, self.at_start, self.repeats = style.opening, style.at_start, style.repeats
        self.triggers = (style.opening,) if style.opening else ()
        if style.at_start and style.opening not in added:
            self.opening, self.triggers = "", ()

    def read(self, calls: Calls, trigger: str) -> Steps[None]:
        source, style = calls.source, self._style
        in_list = trigger.endswith("[")
        if trigger:
            yield from source.spaces()
            in_list = in_list or bool((yield from source.optional("[")))
        while True:
            yield from source.spaces()
            yield from _Object(calls, strict=not trigger).read()
            yield from source.spaces()
            if in_list:
                if (yield from source.expect(",", "]")) == "]":
                    break
                continue
            yield from source.optional(";", ",")
            yield from source.spaces()
            if (yield from source.wait_for(1)) != "{":
                break
        if style.closing:
            while (yield from source.optional("}")):  # models write one too many
                yield from source.spaces()
            yield from source.spaces()
            yield from source.closing(style.closing)

    def group(self, lark: Lark, tools: Sequence[Tool], *, many: bool) -> str:
        style = self._style
        for number, tool in enumerate(tools):
            lark.add(f"call_{number}", self._object(lark, number, tool))
        one = lark.add("call", " | ".join(f"call_{number}" for number in range(len(tools))))
        is_single = self.repeats is not None or not many
        several = one if is_single else f"{one} ({quoted(style.separator)} {one})*"
        begin = quoted(style.begin) if style.begin else ""
        after = [quoted(style.end)] if style.end else []
        after += [lark.mark(style.closing)] if style.closing else []
        return " ".join([begin, several, *after])

    def _object(self, lark: Lark, number: int, tool: Tool) -> str:
        style = self._style
        arguments = lark.schema(f"arguments_{number}", tool.schema)
        name = json.dumps(tool.name, ensure_ascii=False)
        begin = f'{{"name": {name}, "{style.key}": '
        begin = lark.first(f"BEGIN_{number}", begin) if self.at_start else quoted(begin)
        end = quoted("}")
        if style.has_ids:
            end = f"({quoted(_ID_KEY)} /{_ID}/)? {end}"
        return f"{begin} {arguments} {end}"

    def beginnings(self, tools: Sequence[Tool]) -> list[str]:
        found = super().beginnings(tools)
        if self.at_start and tools:
            names = "|".join(
                pattern_of(json.dumps(tool.name, ensure_ascii=False)) for tool in tools
            )
            kind = r'("type"\s*:\s*"function"\s*,\s*)?'
            found.append(rf'\s*\{{\s*{kind}"name"\s*:\s*({names})(?s:.*)')
        return found


class _Object:
    """Reads one call.

    Args:
        calls: the calls of the output.
        strict: whether the name must come first, because no mark says that this is a call.
    """

    def __init__(self, calls: Calls, *, strict: bool) -> None:
        self._calls, self._source, self._strict = calls, calls.source, strict
        self._name: str | None = None
        self._early: str | None = None  # arguments before the name
        self._is_done = False

    def read(self) -> Steps[None]:
        source = self._source
        yield from source.expect("{")
        yield from source.spaces()
        if not (yield from source.optional("}")):
            while True:
                yield from self._member()
                yield from source.spaces()
                if (yield from source.expect(",", "}")) == "}":
                    break
                yield from source.spaces()
        if self._name is None:
            raise Malformed
        if not self._is_done:
            self._write(self._name, "{}")

    def _member(self) -> Steps[None]:
        source = self._source
        key = yield from _string(source)
        yield from source.spaces()
        yield from source.expect(":")
        yield from source.spaces()
        if key == "name" and self._name is None:
            name = yield from _string(source)
            if not self._calls.knows(name):
                raise Malformed
            self._name = name
            if self._early is not None:
                self._write(name, self._early)
        elif key in _ARGUMENTS and not self._is_done and self._early is None:
            yield from self._arguments()
        elif self._strict and self._name is None and key != "type":
            raise Malformed
        else:
            yield from read_value(source, lambda _: None)

    def _arguments(self) -> Steps[None]:
        """Reads the arguments: an object, JSON text of one, or null for none."""
        source, calls = self._source, self._calls
        first = yield from source.wait_for(1)
        if first == "{" and self._name is not None:
            calls.start(self._name)
            yield from read_value(source, calls.argue)
            self._finish()
            return
        if self._strict and self._name is None:
            raise Malformed
        parts = list[str]()
        yield from read_value(source, parts.append)
        text = "".join(parts)
        if first == '"':
            text = string_value(text)
            if not _is_object(text):
                raise Malformed
        elif first != "{":
            if text != "null":
                raise Malformed
            text = "{}"
        if self._name is None:
            self._early = text
        else:
            self._write(self._name, text)

    def _write(self, name: str, arguments: str) -> None:
        self._calls.start(name)
        self._calls.argue(arguments)
        self._finish()

    def _finish(self) -> None:
        self._calls.end()
        self._is_done = True
        self._source.start_recording()


def _string(source: Source) -> Steps[str]:
    parts = list[str]()
    yield from read_string(source, parts.append)
    return string_value("".join(parts))


def _is_object(text: str) -> bool:
    """Whether a text is a JSON object, nested no deeper than allowed."""
    source = Source()
    source.push(text.strip())
    source.ended = True
    if source.ahead(1) != "{":
        return False
    try:
        for _ in read_value(source, lambda _: None):
            raise AssertionError("a complete text is read without waiting")
    except Malformed:
        return False
    return source.available == 0
