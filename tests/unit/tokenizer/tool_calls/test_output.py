"""Outputs split into reasoning, text and calls: the same for every division of the text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easyllm.tokenizer import ChatTemplate
from easyllm.tokenizer.reasoning import ReasoningFormat
from easyllm.tokenizer.tool_calls import (
    CallArguments,
    CallEnd,
    CallStart,
    OutputParser,
    PlainCalls,
    ReasoningPiece,
    TextPiece,
    joined,
    known_formats,
)
from tool_templates import SINGLE, TEMPLATES, called, calling, tool, turn

NAMES = ("<|im_end|>", "<|im_start|>", "<|python_tag|>")
TOOLS = [
    tool("look", place={"type": "string"}, days={"type": "integer"}),
    tool("add", a={"type": "array", "items": {"type": "number"}}),
    tool("now"),
]
FORMATS = {**known_formats({"<|python_tag|>": 1}), "plain": PlainCalls({})}
THINK = ReasoningFormat(open="<think>", close="</think>", ids={})
AWKWARD = 'a "b" \\ \n</x> {"name": 1} é😀 <tool_call> </think>'


def parse(name, *parts, reasoning=None, tools=TOOLS, **options):
    format = None if name is None else FORMATS[name]
    parser = OutputParser(format, reasoning, tools=tools, special_names=NAMES, **options)
    return [piece for part in parts for piece in parser.push(part)] + parser.finish()


def whole(name, *parts, **options):
    return joined(parse(name, *parts, **options))


def written(name, *calls, content=""):
    template = ChatTemplate(TEMPLATES["hermes" if name == "plain" else name])
    return turn(template, calling(*calls, content=content))


@pytest.mark.parametrize("name", FORMATS)
def test_calls_are_read_back(name):
    calls = [("look", {"place": AWKWARD, "days": 3})]
    if name not in SINGLE:
        calls += [("add", {"a": [1, -2.5e3]}), ("now", {}), ("look", {"place": "", "days": 0})]
    output = whole(name, written(name, *calls))
    assert called(output) == calls
    assert output.text == ""


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"llama", "glm4"}))
def test_text_before_calls_is_kept_without_the_space_between(name):
    output = whole(name, written(name, ("now", {}), content="Let me see. \n"))
    assert (output.text, called(output)) == ("Let me see.", [("now", {})])


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_have_the_order_of_the_output(name):
    pieces = parse(name, written(name, ("look", {"place": "x", "days": 1})))
    assert pieces[0] == CallStart(0, "look")
    assert pieces[-1] == CallEnd(0)
    assert all(isinstance(piece, CallArguments) for piece in pieces[1:-1])


@pytest.mark.parametrize("name", FORMATS)
def test_arguments_arrive_while_they_are_written(name):
    text = written(name, ("look", {"place": "x" * 50, "days": 1}))
    half = text[: text.index("xxx") + 25]
    pieces = OutputParser(FORMATS[name], None, tools=TOOLS).push(half)
    assert pieces[0] == CallStart(0, "look")
    assert pieces[1].text.count("x") == 25


def divided(text, cuts):
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


FRAGMENTS = [
    *('{"name": "look", "arguments": {"place": "a", "days": 1}}', '{"name": "now"}', '"name": "no'),
    *("<tool_call>", "</tool_call>", "<function=now>", "<function=look>", "</function>", "\n", " "),
    *("<parameter=place>", "</parameter>", "<parameter=days>\n3\n", "[TOOL_CALLS]", "[ARGS]", "["),
    *(
        "]",
        ";",
        ",",
        "look",
        "now",
        "{}",
        "<arg_key>place</arg_key>",
        "<arg_value>",
        "</arg_value>",
    ),
    *("<|im_end|>", "<|im_", "<|python_tag|>", "<think>", "</think>", "text", "<", "{", "}", "é😀"),
    *(
        '"',
        "\\",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "function<｜tool▁sep｜>now",
        "null",
    ),
    *("```json", "<｜tool▁call▁end｜>", "functools[", "1", "true", "now\n", ": "),
]
OUTPUTS = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


@pytest.mark.parametrize("name", [*FORMATS, None])
@settings(deadline=None, max_examples=60)
@given(text=OUTPUTS, cuts=st.lists(st.integers(0, 10_000), max_size=6), thinks=st.booleans())
def test_the_division_of_the_text_does_not_matter(name, text, cuts, thinks):
    options = {"reasoning": THINK if thinks else None}
    pieces = parse(name, text, **options)
    assert joined(parse(name, *divided(text, cuts), **options)) == joined(pieces)
    assert joined(parse(name, *text, **options)) == joined(pieces)
    starts = [p.index for p in pieces if isinstance(p, CallStart)]
    assert starts == list(range(len(starts)))
    assert [p.index for p in pieces if isinstance(p, CallEnd)] == starts
    for end, call in zip(
        [p for p in pieces if isinstance(p, CallEnd)], joined(pieces).calls, strict=True
    ):
        if end.complete:
            assert isinstance(json.loads(call.arguments), dict)


@settings(deadline=None, max_examples=60)
@given(text=OUTPUTS)
def test_without_format_and_reasoning_the_text_is_unchanged_but_for_names(text):
    expected = text
    for name in NAMES:
        expected = expected.replace(name, "")
    assert whole(None, text).text == expected
    assert all(isinstance(piece, TextPiece) for piece in parse(None, text))


MALFORMED = {
    "hermes": [
        "<tool_call>\nnonsense\n</tool_call>",
        '<tool_call>\n{"name": "nope", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": "{"}\n</tool_call>',
        '<tool_call>\n{"name": 3}\n</tool_call>',
        "<tool_call>",
        '<tool_call>\n{"name": "no',
        "</tool_call> <tool_cal",
    ],
    "llama": [
        '{"x": 1}',
        '{"name": "Bob", "parameters": {}}',
        '["a"]',
        "{",
        '{"name"',
        'See {"name": "now", "parameters": {}}',
    ],
    "mistral": ["[TOOL_CALLS] now", "[TOOL_CALLS] [1]", "[TOOL_CALLS] [", "[TOOL_CALLS]["],
    "deepseek_v3": [
        "<｜tool▁calls▁begin｜>x",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>nope\n{}",
    ],
    "qwen3_coder": [
        "<tool_call>\n<function=nope>\n</function>\n</tool_call>",
        "<tool_call>x",
        "<function=" + "x" * 400,
    ],
    "glm45": ["<tool_call>nope\n</tool_call>", "<tool_call>", "<tool_call><arg_key>"],
    "glm4": ["now", "nope\n{}", "now is the time {", "n", "look at {x}"],
    "mistral_v11": ["[TOOL_CALLS]nope[ARGS]{}", "[TOOL_CALLS]", "[TOOL_CALLS]now[ARGS]"],
}


@pytest.mark.parametrize(("name", "text"), [(n, t) for n in MALFORMED for t in MALFORMED[n]])
def test_what_is_not_a_call_is_text(name, text):
    output = whole(name, text)
    assert not output.calls
    assert output.text == text


def test_names_of_special_tokens_are_removed_from_malformed_calls():
    assert whole("llama", '<|python_tag|>print("x")<|im_end|>').text == 'print("x")'
    assert whole("hermes", "<tool_call><|im_end|>x").text == "<tool_call>x"


def test_names_of_special_tokens_stay_in_arguments():
    text = written("hermes", ("look", {"place": "<|im_end|>", "days": 1}))
    assert called(whole("hermes", text)) == [("look", {"place": "<|im_end|>", "days": 1})]


@pytest.mark.parametrize("name", FORMATS)
def test_cut_calls_are_ended_as_incomplete(name):
    text = written(name, ("look", {"place": "xyz", "days": 1}))
    pieces = parse(name, text[: text.index("xyz") + 2])
    assert pieces[0] == CallStart(0, "look")
    assert pieces[-1] == CallEnd(0, complete=False)
    assert joined(pieces).calls[0].arguments.endswith('"xy')


def test_broken_arguments_end_the_call_and_the_rest_is_text():
    pieces = parse("hermes", '<tool_call>{"name": "now", "arguments": {"a": x}}</tool_call>')
    assert CallEnd(0, complete=False) in pieces
    assert joined(pieces).text == "x}}</tool_call>"


TOLERATED = {
    "no space": ("hermes", '<tool_call>{"name":"now","arguments":{}}</tool_call>'),
    "other order": ("hermes", '<tool_call>{"arguments": {}, "name": "now"}</tool_call>'),
    "text arguments": ("hermes", '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>'),
    "null arguments": ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>'),
    "no arguments": ("hermes", '<tool_call>{"name": "now"}</tool_call>'),
    "one brace too many": ("hermes", '<tool_call>{"name": "now", "arguments": {}}}</tool_call>'),
    "no closing mark": ("hermes", '<tool_call>{"name": "now", "arguments": {}}'),
    "further members": ("hermes", '<tool_call>{"id": [1, {}], "name": "now", "x": 2}</tool_call>'),
    "parameters": ("hermes", '<tool_call>{"name": "now", "parameters": {}}</tool_call>'),
    "a list": ("hermes", '<tool_call>[{"name": "now", "arguments": {}}]</tool_call>'),
    "an id": ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": {}, "id": "abcdef123"}]'),
    "no list": ("mistral", '[TOOL_CALLS]{"name": "now", "arguments": {}}'),
    "a call id": ("mistral_v11", "[TOOL_CALLS]now[CALL_ID]abcdef123[ARGS]{}"),
    "no mark of arguments": ("mistral_v11", "[TOOL_CALLS]now{}"),
    "a tag for Python": ("llama", 'Hm.<|python_tag|>{"name": "now", "parameters": {}}'),
    "a type": ("llama", '{"type": "function", "name": "now", "parameters": {}}'),
    "blanks first": ("llama", '\n\n{"name": "now", "parameters": {}}'),
    "no outer tag": ("qwen3_coder", "<function=now>\n</function>\n</tool_call>"),
    "no inner end": ("qwen3_coder", "<tool_call><function=now></tool_call>"),
    "no newline": ("glm45", "<tool_call>now</tool_call>"),
    "no fence": ("deepseek_v3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now {}"),
    "no section": ("kimi_k2", "<|tool_call_begin|>now<|tool_call_argument_begin|>{}"),
}


@pytest.mark.parametrize("label", TOLERATED)
def test_usual_variations_are_read(label):
    name, text = TOLERATED[label]
    output = whole(name, text)
    assert called(output) == [("now", {})]
    assert output.text in ("", "Hm.")


def test_several_calls_in_one_group_are_read():
    text = '{"name": "now", "parameters": {}};{"name": "now", "parameters": {}}'
    assert len(whole("llama", text).calls) == 2
    text = '<tool_call>{"name": "now"}\n{"name": "now"}</tool_call><tool_call>{"name": "now"}'
    assert len(whole("hermes", text).calls) == 3
    text = "<tool_call><function=now></function>\n<function=now></function></tool_call>"
    assert len(whole("qwen3_coder", text).calls) == 2


def test_text_after_calls_is_kept():
    text = 'One.\n<tool_call>{"name": "now"}</tool_call>\nTwo.\n'
    assert whole("hermes", text).text == "One.\n\nTwo."
    assert whole("hermes", text.removeprefix("One.")).text == "Two."


def test_plain_answers_keep_their_whitespace():
    assert whole("hermes", " a \n b \n").text == " a \n b \n"
    assert whole("hermes", "\n").text == "\n"


def test_any_name_is_a_tool_if_none_is_declared():
    output = whole("hermes", '<tool_call>{"name": "other", "arguments": {}}', tools=())
    assert called(output) == [("other", {})]


THOUGHTS = {
    "<think>\nhm\n\n</think>\n\nfour": ("hm", "four"),
    "\n<think>hm</think>four": ("hm", "four"),
    "<think></think>four": ("", "four"),
    "<think>\nhm\n": ("hm\n", ""),
    "four <think>hm</think>": ("", "four <think>hm</think>"),
    "  four": ("", "  four"),
    "<thin": ("", "<thin"),
    "<think>a<|im_end|>b</think>c</think>": ("ab", "c</think>"),
    "<think>a\n\nb\n</think>\n  c": ("a\n\nb", "  c"),
}


@pytest.mark.parametrize("text", THOUGHTS)
@pytest.mark.parametrize("name", ["hermes", "llama", None])
def test_reasoning_is_split_from_the_answer(name, text):
    output = whole(name, text, reasoning=THINK)
    assert (output.reasoning, output.text) == THOUGHTS[text]


def test_reasoning_that_the_prompt_has_opened_is_split():
    pieces = parse(
        None, "hm\n", "</th", "ink>\n", "\nfour", reasoning=THINK, starts_in_reasoning=True
    )
    assert pieces == [ReasoningPiece("hm"), TextPiece("four")]


@pytest.mark.parametrize("name", FORMATS)
def test_calls_follow_reasoning_and_none_are_in_it(name):
    text = written(name, ("now", {}))
    output = whole(name, f"<think>\n{text}\n</think>\n\n{text}", reasoning=THINK)
    assert called(output) == [("now", {})]
    assert output.reasoning.strip() == text.strip()
    assert output.text == ""


def test_text_is_passed_on_at_once_except_a_possible_mark():
    parser = OutputParser(FORMATS["hermes"], THINK, special_names=NAMES)
    assert parser.push("Hello, <b>") == [TextPiece("Hello, <b>")]
    assert parser.push(" <tool") == []
    assert parser.push("x <|im_") == [TextPiece(" <toolx")]
    assert parser.push("y") == [TextPiece(" <|im_y")]


HOSTILE = {
    "openings": ("hermes", "<tool_call>"),
    "nested objects": ("hermes", '<tool_call>{"name": "now", "arguments": {"a":'),
    "brackets": ("hermes", "<tool_call>["),
    "unclosed string": ("hermes", '<tool_call>{"name": "'),
    "half marks": ("hermes", "<tool_cal"),
    "blanks": ("hermes", "<tool_call> "),
    "digits": ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1'),
    "names": ("hermes", "<|im_end|>"),
    "parameters": ("qwen3_coder", "<function=look>\n<parameter=place>"),
    "headers": ("deepseek_v3", "<｜tool▁call▁begin｜>"),
    "braces": ("llama", '{"name": "now", "parameters": '),
}


@pytest.mark.parametrize("label", HOSTILE)
def test_hostile_outputs_are_read_once(label):
    """What waits for more text is shorter than a mark, so no text is read again and again."""
    name, text = HOSTILE[label]
    parser = OutputParser(FORMATS[name], THINK, tools=TOOLS, special_names=NAMES)
    given, longest = text * 2000, 0
    for place in range(0, len(given), 7):
        parser.push(given[place : place + 7])
        longest = max(longest, parser._source.available)
    parser.finish()
    assert longest < 32


@pytest.mark.parametrize("rest", ["\n", "\n</tool", "\n</tool_call"])
def test_a_closing_mark_that_the_end_cuts_off_is_not_text(rest):
    text = '<tool_call>\n{"name": "now", "arguments": {}}'
    output = joined(parse("hermes", text + rest))
    assert called(output) == [("now", {})]
    assert output.text == ""
