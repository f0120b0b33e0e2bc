"""Tool calls as the tool's name followed by a JSON object of arguments.

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add       DeepSeek-V3, R1
```json
{"a": 1}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>          DeepSeek-V3.1
[TOOL_CALLS]add[ARGS]{"a": 1}                                       Mistral from v11 on
<|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>{...}  Kimi-K2
add                                                                 GLM-4
{"a": 1}
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from easyllm.tokenizer.tool_calls.base import ToolFormat
from easyllm.tokenizer.tool_calls.json_reader import read_value
from easyllm.tokenizer.tool_calls.lark import Lark, pattern_of, quoted
from easyllm.tokenizer.tool_calls.reader import Calls, read_up_to
from easyllm.tokenizer.tool_calls.source import Malformed, Steps
from easyllm.tokenizer.tool_calls.tools import Tool

NUMBER = "{number}"
"""The number of a call, of which any is accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedStyle:
    """How a model writes a name and its arguments.

    Attributes:
        section: the marks around all calls, if there are any.
        opening: the mark before a call; "" if the answer begins with the name.
        before_name: the texts and marks between it and the name.
        after_name: the texts and marks between the name and the arguments; NUMBER for digits.
        after_arguments: what is written between the arguments and the closing mark.
        closing: the mark after a call.
        separator: what is written between two calls.
        header: regular expression of all that may be between the opening mark and the arguments;
            its group `name` is the name.
    """

    section: tuple[str, str] | None = None
    opening: str = ""
    before_name: tuple[str, ...] = ()
    after_name: tuple[str, ...] = ()
    after_arguments: str = ""
    closing: str = ""
    separator: str = ""
    header: str = r"\s*(?P<name>\S+)\s*"


class NamedJson(ToolFormat):
    """A format of calls as a name followed by JSON.

    Args:
        name: name of the format.
        style: how the calls are written.
        added: ids of the tokenizer's added tokens by their names.
    """

    def __init__(self, name: str, style: NamedStyle, added: Mapping[str, int]) -> None:
        super().__init__(added)
        self.name, self._style = name, style
        self._header = re.compile(style.header)
        self.at_start = not style.opening
        first = style.section[0] if style.section is not None else style.opening
        self.opening = first
        self.triggers = tuple(dict.fromkeys(mark for mark in (first, style.opening) if mark))

    def read(self, calls: Calls, trigger: str) -> Steps[None]:
        source, style = calls.source, self._style
        if trigger and trigger != style.opening:
            yield from source.spaces()
            yield from source.expect(style.opening)
        while True:
            accepts = None if trigger else calls.may_know
            match = self._header.fullmatch((yield from read_up_to(source, "{", accepts)))
            if match is None:
                raise Malformed
            calls.start(match["name"])
            yield from read_value(source, calls.argue)
            calls.end()
            source.start_recording()
            if style.after_arguments:
                yield from source.spaces()
                yield from source.optional(style.after_arguments.strip())
            if style.closing:
                yield from source.spaces()
                yield from source.closing(style.closing)
            yield from source.spaces()
            if style.section is not None and (yield from source.closing(style.section[1])):
                return
            if not style.opening or not (yield from source.optional(style.opening)):
                return

    def group(self, lark: Lark, tools: Sequence[Tool], *, many: bool) -> str:
        style = self._style
        for number, tool in enumerate(tools):
            lark.add(f"call_{number}", self._call(lark, number, tool))
        lark.add("call", " | ".join(f"call_{number}" for number in range(len(tools))))
        opening = lark.mark(style.opening) if style.opening else ""
        between = quoted(style.separator) if style.separator else ""
        more = f" ({between} {opening} call)*" if many and opening else ""
        if style.section is None:
            return f"call{more}"
        return f"{opening} call{more} {lark.mark(style.section[1])}"

    def _call(self, lark: Lark, number: int, tool: Tool) -> str:
        style = self._style
        arguments = lark.schema(f"arguments_{number}", tool.schema)
        closing = [style.after_arguments, style.closing]
        before = [lark.mark(part) for part in style.before_name]
        between = [
            "/[0-9]{1,4}/" if part == NUMBER else lark.mark(part) for part in style.after_name
        ]
        after = [lark.mark(part) for part in closing if part]
        if self.at_start:
            before, between = [], []
            name = lark.first(f"BEGIN_{number}", f"{tool.name}{''.join(style.after_name)}")
        else:
            name = quoted(tool.name)
        return " ".join([*before, name, *between, arguments, *after])

    def beginnings(self, tools: Sequence[Tool]) -> list[str]:
        found = super().beginnings(tools)
        if self.at_start and tools:
            names = "|".join(pattern_of(tool.name) for tool in tools)
            found.append(rf"\s*({names}){pattern_of(''.join(self._style.after_name))}(?s:.*)")
        return found
