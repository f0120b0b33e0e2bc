"""Conversations with tools, rewritten for chat templates that do not know them."""

import json

import pytest

from chat_templates import GEMMA
from conversation_rows import assistant, user
from easyllm.tokenizer import ChatTemplate
from easyllm.tokenizer.tool_calls import OutputParser, PlainCalls, detect_tool_format, joined
from easyllm.tokenizer.tool_calls.known import known_formats
from tool_templates import called, calling, tool

TOOLS = [tool("look", place={"type": "string"})]
SYSTEM = {"role": "system", "content": "Be terse."}


def prepared(*messages, tools=TOOLS, **options):
    found, left = PlainCalls({}, **options).prepare(list(messages), tools)
    assert left is None
    return found


def test_tools_are_described_in_the_system_message():
    first, second = prepared(SYSTEM, user("Hi"))
    assert first["role"] == "system"
    assert first["content"].startswith("Be terse.\n\n# Tools")
    assert json.dumps(TOOLS[0]) in first["content"]
    assert second == user("Hi")
    assert prepared(user("Hi"))[0]["role"] == "system"


def test_tools_are_described_to_the_user_if_there_is_no_system_message():
    (first,) = prepared(user("Hi"), has_system=False)
    assert first["role"] == "user"
    assert first["content"].startswith("# Tools")
    assert first["content"].endswith("\n\nHi")


def test_calls_and_results_become_text():
    messages = prepared(
        user("Hi"),
        calling(("look", {"place": "é"}), ("look", {"place": ""}), content="Hm."),
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "5"}]},
        assistant("Nine."),
        tools=None,
    )
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]
    assert messages[1] == assistant(
        'Hm.\n<tool_call>\n{"name": "look", "arguments": {"place": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "look", "arguments": {"place": ""}}\n</tool_call>'
    )
    assert messages[2]["content"] == (
        "<tool_response>\n4\n</tool_response>\n<tool_response>\n5\n</tool_response>"
    )


def test_written_calls_are_read_back():
    message = prepared(calling(("look", {"place": "x"})), tools=None)[0]
    parser = OutputParser(PlainCalls({}), None, tools=TOOLS)
    output = joined([*parser.push(message["content"]), *parser.finish()])
    assert called(output) == [("look", {"place": "x"})]


def test_a_conversation_without_tools_is_unchanged():
    assert prepared(SYSTEM, user("Hi"), tools=None) == [SYSTEM, user("Hi")]
    assert prepared(SYSTEM, user("Hi"), tools=[]) == [SYSTEM, user("Hi")]


def test_native_formats_pass_everything_on():
    messages = [user("Hi"), calling(("look", {"place": "x"}))]
    assert known_formats({})["hermes"].prepare(messages, TOOLS) == (messages, TOOLS)


@pytest.mark.parametrize("rejects", [False, True])
def test_a_template_without_system_messages_is_recognised(smollm2_tokenizer, rejects):
    source = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    found = detect_tool_format(ChatTemplate(source if rejects else GEMMA), {}, {"bos_token": ""})
    messages, _ = found.prepare([user("Hi")], TOOLS)
    assert messages[0]["role"] == ("user" if rejects else "system")


def test_smollm2_is_given_the_tools(smollm2_tokenizer):
    messages, tools = smollm2_tokenizer.tool_format.prepare([user("Hi")], TOOLS)
    text = smollm2_tokenizer.encode_chat(messages, tools=tools, reject_unrendered=True).text
    assert "<tools>" in text
    assert '"name": "look"' in text
