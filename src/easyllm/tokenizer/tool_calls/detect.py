"""Finding the format in which a model writes tool calls, from its chat template.

A conversation with a call is rendered, and the format is the one whose reader finds this call in
the rendered text. So a template is recognised by what it writes, not by its source.
"""

import json
from collections.abc import Mapping

from easyllm.core.errors import DataError
from easyllm.core.json_types import JsonObject
from easyllm.tokenizer.chat import ChatTemplate
from easyllm.tokenizer.messages import Message
from easyllm.tokenizer.reasoning import ReasoningFormat
from easyllm.tokenizer.tool_calls.base import ToolFormat
from easyllm.tokenizer.tool_calls.known import CUES, known_formats
from easyllm.tokenizer.tool_calls.output import OutputParser
from easyllm.tokenizer.tool_calls.pieces import Call, joined
from easyllm.tokenizer.tool_calls.plain import PlainCalls

_QUESTION: Message = {"role": "user", "content": "How far is it?"}
_ARGUMENTS = {"place": "Paris", "days": 3}
_TOOL: JsonObject = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up the distance.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["place"],
        },
    },
}
_LONG_ID = "call_0123456789abcdef01234567"
_SYSTEM: Message = {"role": "system", "content": "Answer in one word."}


class _Probe:
    """Renders test conversations."""

    def __init__(self, template: ChatTemplate, variables: Mapping[str, str]) -> None:
        self._template, self._variables = template, variables

    def text(
        self, *messages: Message, tools: list[JsonObject] | None = None, prompt: bool = False
    ) -> str | None:
        """Returns the rendered text; None if the template rejects it."""
        try:
            return self._template.render(
                list(messages), tools=tools, add_generation_prompt=prompt, special=self._variables
            )
        except DataError:
            return None


def detect_tool_format(
    template: ChatTemplate | None,
    added: Mapping[str, int],
    variables: Mapping[str, str],
    *,
    special_names: tuple[str, ...] = (),
    reasoning: ReasoningFormat | None = None,
) -> ToolFormat:
    """Returns the format of tool calls of a chat template.

    If the template does not show tools, or writes calls in a format that is not known, the result
    is `PlainCalls`, which describes the tools in a message.

    Args:
        template: the template used with tools; None if the model has none.
        added: ids of the tokenizer's added tokens by their names.
        variables: the template variables `bos_token` and so on.
        special_names: the names of the special tokens.
        reasoning: the format of the reasoning.
    """
    if template is None:
        return PlainCalls(added)
    probe = _Probe(template, variables)
    without, shown = probe.text(_QUESTION), probe.text(_QUESTION, tools=[_TOOL])
    if shown is None or shown == without or "look_up" not in shown:
        return PlainCalls(added, has_system=_has_system(probe))
    formats = known_formats(added)
    turn = _call_turn(probe) or ""
    rests = {name: _rest(f, turn, special_names, reasoning) for name, f in formats.items()}
    found = {name: rest for name, rest in rests.items() if rest is not None}
    if found:
        format = formats[min(found, key=lambda name: len(found[name]))]
        format.allows_many = probe.text(_QUESTION, _calls("abcdef123", "abcdef124")) is not None
        format.short_ids = probe.text(_QUESTION, _calls(_LONG_ID)) is None
        return format
    for name, cue in CUES.items():
        if cue in template.source:
            return formats[name]
    return PlainCalls(added, has_system=_has_system(probe))


def _calls(*ids: str) -> Message:
    """Returns an assistant's message with a call for each id."""
    function = {"name": "look_up", "arguments": _ARGUMENTS}
    calls = [{"id": each, "type": "function", "function": function} for each in ids]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _has_system(probe: _Probe) -> bool:
    text = probe.text(_SYSTEM, _QUESTION)
    return text is not None and _SYSTEM["content"] in text


def _call_turn(probe: _Probe) -> str | None:
    """Returns what the template writes for an assistant's call, without the turn's header."""
    for tools in (None, [_TOOL]):
        text = probe.text(_QUESTION, _calls("abcdef123"), tools=tools)
        if text is not None and "look_up" in text:
            prompt = probe.text(_QUESTION, tools=tools, prompt=True)
            if prompt is not None and text.startswith(prompt):
                return text[len(prompt) :]
            return text[text.find(_QUESTION["content"]) + len(_QUESTION["content"]) :]
    return None


def _rest(
    format: ToolFormat,
    turn: str,
    special_names: tuple[str, ...],
    reasoning: ReasoningFormat | None,
) -> str | None:
    """Returns the text of a turn outside its call; None if the format does not find the call."""
    parser = OutputParser(format, reasoning, tools=[_TOOL], special_names=special_names)
    output = joined([*parser.push(turn), *parser.finish()])
    if [_arguments(call) for call in output.calls] != [_ARGUMENTS]:
        return None
    return output.text


def _arguments(call: Call) -> JsonObject | None:
    try:
        arguments: JsonObject = json.loads(call.arguments)
    except ValueError:
        return None
    return arguments
