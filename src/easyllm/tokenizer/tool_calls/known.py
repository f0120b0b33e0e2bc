"""The formats of tool calls that models were trained with."""

from collections.abc import Mapping

from easyllm.tokenizer.tool_calls.base import ToolFormat
from easyllm.tokenizer.tool_calls.json_objects import JsonObjects, JsonStyle
from easyllm.tokenizer.tool_calls.named_json import NUMBER, NamedJson, NamedStyle
from easyllm.tokenizer.tool_calls.tagged import Tagged, TagStyle

HERMES = JsonStyle(
    opening="<tool_call>", closing="</tool_call>", begin="\n", end="\n", repeats="\n"
)
JSON_STYLES: Mapping[str, JsonStyle] = {
    "hermes": HERMES,
    "llama": JsonStyle(opening="<|python_tag|>", key="parameters", separator="; ", at_start=True),
    "mistral": JsonStyle(opening="[TOOL_CALLS]", begin=" [", end="]", has_ids=True),
    "phi4": JsonStyle(opening="functools[", end="]"),
    "granite": JsonStyle(opening="<|tool_call|>", begin="[", end="]"),
    "nemotron": JsonStyle(opening="<TOOLCALL>", closing="</TOOLCALL>", begin="[", end="]"),
    "hunyuan": JsonStyle(opening="<tool_calls>", closing="</tool_calls>", begin="[", end="]"),
}
_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
NAMED_STYLES: Mapping[str, NamedStyle] = {
    "deepseek_v3": NamedStyle(
        section=_DEEPSEEK,
        opening="<｜tool▁call▁begin｜>",
        before_name=("function", "<｜tool▁sep｜>"),
        after_name=("\n```json\n",),
        after_arguments="\n```",
        closing="<｜tool▁call▁end｜>",
        separator="\n",
        header=r"\s*\w*<｜tool▁sep｜>\s*(?P<name>[^\s<`]+)\s*(```(json)?)?\s*",
    ),
    "deepseek_v31": NamedStyle(
        section=_DEEPSEEK,
        opening="<｜tool▁call▁begin｜>",
        after_name=("<｜tool▁sep｜>",),
        closing="<｜tool▁call▁end｜>",
        header=r"\s*(?P<name>[^\s<]+)\s*<｜tool▁sep｜>\s*",
    ),
    "kimi_k2": NamedStyle(
        section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        opening="<|tool_call_begin|>",
        before_name=("functions.",),
        after_name=(":", NUMBER, "<|tool_call_argument_begin|>"),
        closing="<|tool_call_end|>",
        header=r"\s*(functions\.)?(?P<name>[^\s:<]+)(:\d+)?\s*<\|tool_call_argument_begin\|>\s*",
    ),
    "mistral_v11": NamedStyle(
        opening="[TOOL_CALLS]",
        after_name=("[ARGS]",),
        header=r"\s*(?P<name>[^\s\[]+)\s*(\[CALL_ID\][^\[]*)?(\[ARGS\])?\s*",
    ),
    "glm4": NamedStyle(after_name=("\n",), header=r"(?P<name>\S+)\s*"),
}
TAG_STYLES: Mapping[str, TagStyle] = {
    "qwen3_coder": TagStyle(
        opening="<tool_call>",
        closing="</tool_call>",
        gap="\n",
        call=("<function=", ">\n"),
        call_end="</function>",
        key=("<parameter=", ">"),
        value=("", "</parameter>"),
        padding="\n",
    ),
    "glm45": TagStyle(
        opening="<tool_call>",
        closing="</tool_call>",
        call=("", "\n"),
        key=("<arg_key>", "</arg_key>"),
        value=("<arg_value>", "</arg_value>"),
    ),
    "seed_oss": TagStyle(
        opening="<seed:tool_call>",
        closing="</seed:tool_call>",
        gap="\n",
        call=("<function=", ">\n"),
        call_end="</function>",
        key=("<parameter=", ">"),
        value=("", "</parameter>"),
    ),
    "minimax_m2": TagStyle(
        opening="<minimax:tool_call>",
        closing="</minimax:tool_call>",
        gap="\n",
        call=('<invoke name="', '">\n'),
        call_end="</invoke>",
        key=('<parameter name="', '">'),
        value=("", "</parameter>"),
    ),
}
CUES = {"phi4": "functools["}
"""Texts in the instructions of templates that show tools, but do not write calls themselves."""


def known_formats(added: Mapping[str, int]) -> dict[str, ToolFormat]:
    """Returns all formats by name.

    Args:
        added: ids of the tokenizer's added tokens by their names.
    """
    return {
        **{name: JsonObjects(name, style, added) for name, style in JSON_STYLES.items()},
        **{name: NamedJson(name, style, added) for name, style in NAMED_STYLES.items()},
        **{name: Tagged(name, style, added) for name, style in TAG_STYLES.items()},
    }
