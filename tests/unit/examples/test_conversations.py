"""Rows to conversations: formats, tools, and invalid rows with their locations."""

import json

import pytest

from conversation_rows import FORMATS, TOOLS, assistant, read, user
from easyllm.core.errors import DataError
from easyllm.examples.conversations import (
    detect_format,
)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_detected_and_read_as_messages(name):
    kind, values, messages = FORMATS[name]
    assert detect_format(values) == kind
    conversation = read(values)
    assert conversation.messages == messages
    assert conversation.tools is None
    assert conversation.location == "data.jsonl:7"
    assert conversation.format == kind


def test_sharegpt_function_calls_become_tool_calls():
    calls = {"name": "add", "arguments": {"a": 1}}
    conversation = read(
        {
            "tools": json.dumps(TOOLS),
            "conversations": [
                {"from": "human", "value": "1+1?"},
                {"from": "function_call", "value": json.dumps(calls)},
                {"from": "observation", "value": "2"},
                {"from": "function_call", "value": json.dumps([calls, {"name": "stop"}])},
                {"from": "gpt", "value": "Two."},
            ],
        }
    )
    assert conversation.tools == TOOLS
    assert [m["role"] for m in conversation.messages] == [
        *["user", "assistant", "tool", "assistant", "assistant"]
    ]
    first, second = (conversation.messages[i]["tool_calls"] for i in (1, 3))
    assert first == [{"type": "function", "function": calls}]
    assert [call["function"] for call in second] == [calls, {"name": "stop", "arguments": {}}]
    assert conversation.messages[2] == {"role": "tool", "content": "2"}


def test_messages_keep_their_tools_and_tool_calls():
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    conversation = read({"messages": [user("q"), called], "tools": TOOLS})
    function = {"name": "add", "arguments": {}}
    assert conversation.messages[1] == assistant("") | {"tool_calls": [{"function": function}]}
    assert conversation.tools == TOOLS


def test_json_encoded_call_arguments_become_objects_without_modifying_the_row():
    def called(arguments):
        function = {"name": "add", "arguments": arguments}
        return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}

    values = {"messages": [user("q"), called('{"a": [1, "b"]}'), called(""), called({"a": 1})]}
    before = json.dumps(values)
    assert read(values).messages == [
        *[user("q"), called({"a": [1, "b"]}), called({}), called({"a": 1})]
    ]
    assert json.dumps(values) == before


@pytest.mark.parametrize("tools", [None, [], "", "  ", "[]"])
def test_empty_tools_are_none(tools):
    assert read({"messages": [assistant("a")], "tools": tools}).tools is None


WRONG = {
    "no known format": ({"text": "x", "label": 1}, r"unknown format \(keys: label, text\)"),
    "no keys": ({}, r"keys: none"),
    "messages that are no list": (
        {"messages": "hello"},
        r"unknown format \(keys: messages\): messages is text, expected a list like",
    ),
    "messages that are an object": (
        {"messages": {"0": user("q")}},
        "messages is of type dict, expected a list",
    ),
    "conversations that are null": (
        {"conversations": None},
        "conversations is null, expected a list",
    ),
    "a question alone": ({"instruction": "q", "input": ""}, "it has 'instruction' but no 'output'"),
    "an answer alone": ({"completion": "a"}, "it has 'completion' but no 'prompt'"),
    "a plain text": ({"text": "x"}, "it is plain text, which `easyllm data build` packs"),
    "no assistant": ({"messages": [user("q")]}, "no assistant turn"),
    "no messages": ({"messages": []}, "no assistant turn"),
    "no turns": ({"conversations": []}, "no assistant turn"),
    "only questions": ({"conversations": [{"from": "human", "value": "q"}]}, "no assistant turn"),
    "a prompt alone": ({"prompt": [user("q")], "completion": [user("r")]}, "no assistant turn"),
    "a message without a role": ({"messages": [{"content": "q"}]}, "message 0 has no role"),
    "a message that is text": ({"messages": [user("q"), "a"]}, "message 1 has no role"),
    "a message without content": ({"messages": [{"role": "user"}]}, "message 0 has no text"),
    "an image": (
        {"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}]), assistant("a")]},
        "message 0 has a part of type 'image_url'; only text is supported",
    ),
    "a prompt of texts": ({"prompt": ["q"], "completion": ["a"]}, "message 0 has no role"),
    "a completion without content": (
        {"prompt": [user("q")], "completion": [{"role": "assistant"}]},
        "message 1 has no text",
    ),
    "a prompt of messages to a text": (
        {"prompt": [user("q")], "completion": "a"},
        "prompt is of type list, expected text",
    ),
    "a number as output": (
        {"instruction": "q", "output": 4},
        "output is of type int, expected text",
    ),
    "a list as input": ({"instruction": "q", "input": [1], "output": "a"}, "input is of type list"),
    "history of texts": ({"instruction": "q", "output": "a", "history": ["x"]}, "history"),
    "history of triples": (
        {"instruction": "q", "output": "a", "history": [["x", "y", "z"]]},
        "history is not a list of pairs",
    ),
    "history of numbers": ({"instruction": "q", "output": "a", "history": [[1, 2]]}, "history"),
    "history that is a number": ({"instruction": "q", "output": "a", "history": 3}, "history"),
    "an unknown speaker": (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        "turn 0 is from 'narrator'; expected one of human, .*function_call",
    ),
    "a turn without a value": (
        {"conversations": [{"from": "human"}]},
        "turn 0 has no text value",
    ),
    "a turn that is text": ({"conversations": ["x"]}, "turn 0 has no text value"),
    "a call that is not JSON": (
        {"conversations": [{"from": "function_call", "value": "add(1)"}]},
        "turn 0 is a function_call without name and arguments",
    ),
    "a call without a name": (
        {"conversations": [{"from": "function_call", "value": "{}"}]},
        "turn 0 is a function_call without name and arguments",
    ),
    "a call that is a number": (
        {"conversations": [{"from": "function_call", "value": "4"}]},
        "turn 0 is a function_call without name and arguments",
    ),
    "tools that are no JSON": (
        {"messages": [assistant("a")], "tools": "[add"},
        "tools is not JSON",
    ),
    "tools that are no list": (
        {"messages": [assistant("a")], "tools": {"name": "add"}},
        "tools is not a list of functions",
    ),
    "tools that are names": (
        {"messages": [assistant("a")], "tools": ["add"]},
        "tools is not a list of functions",
    ),
    "tool calls without a name": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
        "message 0 has tool_calls without name",
    ),
    "tool calls that are text": (
        {"messages": [{"role": "assistant", "tool_calls": "add(1)"}]},
        "message 0 has tool_calls without name",
    ),
    "arguments that are no JSON": (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"name": "add", "arguments": "a=1"}]},
            ]
        },
        "message 0 has tool_calls without name and JSON arguments",
    ),
    "a preference pair": (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "is a preference pair .*expected a conversation",
    ),
    "a preference pair after a conversation": (
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        "is a preference pair .*expected a conversation",
    ),
    "a bad answer": (
        {"prompt": "q", "completion": "a", "label": False},
        "has a binary label",
    ),
    "a judged conversation": (
        {"messages": [user("q"), assistant("a")], "kto_tag": True},
        "has a binary label",
    ),
    "a question whose choices are apart": (
        {"question": "q", "choices": ["a", "b"], "answer": "a"},
        r"unknown format \(keys: answer, choices, question\)",
    ),
    "an answer by number": ({"question": "q", "answer": 2}, "answer is of type int, expected text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_invalid_row_is_refused_with_its_location(name):
    values, message = WRONG[name]
    with pytest.raises(DataError, match=rf"^data\.jsonl:7.*{message}"):
        read(values)


def test_an_unknown_format_lists_the_known_ones():
    with pytest.raises(DataError) as caught:
        read({"text": "x"})
    for name in ("messages", "alpaca", "sharegpt", "prompt-completion", "question-answer"):
        assert name in str(caught.value)
