"""Tool calls as tags, each parameter apart, whose values are plain text.

    <tool_call>                       Qwen3-Coder
    <function=add>
    <parameter=a>
    1
    </parameter>
    </function>
    </tool_call>

    <tool_call>add                    GLM-4.5
    <arg_key>a</arg_key>
    <arg_value>1</arg_value>
    </tool_call>

The reader writes the arguments as JSON, with the types of the tool's schema.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from easyllm.core.json_types import Json, JsonMapping
from easyllm.tokenizer.tool_calls.base import ToolFormat
from easyllm.tokenizer.tool_calls.lark import Lark, quoted
from easyllm.tokenizer.tool_calls.reader import Calls, read_up_to
from easyllm.tokenizer.tool_calls.source import WHITESPACE, Malformed, Marks, Steps
from easyllm.tokenizer.tool_calls.tagged_grammar import (
    Parameter,
    ValueEnd,
    parameters_of,
    value_rule,
)
from easyllm.tokenizer.tool_calls.tools import Tool
from easyllm.tokenizer.tool_calls.values import STRING, converted, types_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TagStyle:
    """The tags of a format.

    Attributes:
        opening, closing: the marks around calls.
        gap: what is written after the opening and before the closing mark.
        call: the texts before and after a tool's name.
        call_end: the tag after the last parameter; "" if the closing mark follows.
        key: the marks before and after the name of a parameter.
        value: the mark before the value, if the name does not end with it, and the one after it.
        padding: what is written around a value.
        between: what is written after each parameter.
    """

    opening: str
    closing: str
    gap: str = ""
    call: tuple[str, str]
    call_end: str = ""
    key: tuple[str, str]
    value: tuple[str, str]
    padding: str = ""
    between: str = "\n"


class Tagged(ToolFormat):
    """A format of calls as tags.

    Args:
        name: name of the format.
        style: its tags.
        added: ids of the tokenizer's added tokens by their names.
    """

    repeats = "\n"

    def __init__(self, name: str, style: TagStyle, added: Mapping[str, int]) -> None:
        super().__init__(added)
        self.name, self._style, self.opening = name, style, style.opening
        self.triggers = tuple(_present(style.opening, style.call[0]))
        self._ends = Marks([style.padding + style.value[1], style.value[1]])

    def read(self, calls: Calls, trigger: str) -> Steps[None]:
        source, style = calls.source, self._style
        while True:
            if trigger == style.opening:
                yield from source.spaces()
                if style.call[0]:
                    yield from source.expect(style.call[0])
            after = style.call[1].strip() or "\n"
            name = yield from read_up_to(source, f"{after}<")
            calls.start(name.strip(WHITESPACE))
            yield from source.closing(after)
            yield from self._parameters(calls, calls.schema)
            calls.end()
            source.start_recording()
            yield from source.spaces()
            trigger = yield from source.closing(*_present(style.closing, style.call[0]))
            if not trigger or trigger == style.closing:
                return

    def _parameters(self, calls: Calls, schema: JsonMapping) -> Steps[None]:
        source, style = calls.source, self._style
        before = "{"
        while True:
            yield from source.spaces()
            tags = _present(style.key[0], style.call_end, style.closing)
            if (yield from source.expect(*tags)) != style.key[0]:
                calls.argue("}" if before != "{" else "{}")
                return
            key = yield from read_up_to(source, style.key[1][0])
            yield from source.expect(style.key[1])
            if style.value[0]:
                yield from source.spaces()
                yield from source.expect(style.value[0])
            calls.argue(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            before = ", "
            properties = schema.get("properties")
            known = properties if isinstance(properties, Mapping) else {}
            yield from self._value(
                calls, known.get(key, schema.get("additionalProperties")), schema
            )

    def _value(self, calls: Calls, schema: Json, root: JsonMapping) -> Steps[None]:
        source = calls.source
        yield from source.optional(*_present(self._style.padding))
        if types_of(schema, root) == STRING:
            calls.argue('"')
            end = yield from source.until(self._ends, lambda text: calls.argue(_escaped(text)))
            if not end:
                raise Malformed
            calls.argue('"')
            return
        parts = list[str]()
        if not (yield from source.until(self._ends, parts.append)):
            raise Malformed
        value = converted("".join(parts), schema, root)
        calls.argue(json.dumps(value, ensure_ascii=False))

    def group(
        self,
        lark: Lark,
        tools: Sequence[Tool],
        *,
        many: bool,  # noqa: ARG002 - each call has its own marks
    ) -> str:
        for number, tool in enumerate(tools):
            lark.add(f"call_{number}", self._call(lark, number, tool))
        lark.add("call", " | ".join(f"call_{number}" for number in range(len(tools))))
        return "call"

    def _call(self, lark: Lark, number: int, tool: Tool) -> str:
        style = self._style
        begin = f"{style.gap}{style.call[0]}{tool.name}{style.call[1]}"
        parts = [quoted(begin)]
        for place, parameter in enumerate(parameters_of(tool)):
            rule = lark.add(
                f"parameter_{number}_{place}", self._parameter(lark, number, place, parameter, tool)
            )
            parts.append(f"{rule}{'' if parameter.is_required else parameter.repeat}")
        end = f"{style.call_end}{style.gap}"
        return " ".join([*parts, *([quoted(end)] if end else []), lark.mark(style.closing)])

    def _parameter(
        self, lark: Lark, number: int, place: int, parameter: Parameter, tool: Tool
    ) -> str:
        style = self._style
        name = "/[^<>\\n]{1,64}/" if parameter.name is None else quoted(parameter.name)
        opened = [lark.mark(style.key[0]), name, lark.mark(style.key[1])]
        if style.value[0]:
            opened += [quoted("\n"), lark.mark(style.value[0])]
        if style.padding:
            opened.append(quoted(style.padding))
        end = ValueEnd(style.padding, style.value[1], style.between)
        value = value_rule(lark, f"value_{number}_{place}", parameter, tool, end)
        return " ".join([*opened, value])


def _present(*texts: str) -> list[str]:
    return [text for text in texts if text]


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
