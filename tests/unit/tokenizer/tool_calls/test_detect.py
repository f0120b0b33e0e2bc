"""The format of tool calls that a chat template writes."""

import pytest

from chat_conversations import with_template
from chat_templates import GEMMA
from conversation_rows import user
from easyllm.tokenizer import ChatTemplate
from easyllm.tokenizer.tool_calls import detect_tool_format
from tool_templates import SILENT, TEMPLATES, calling, tool

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


def detected(source):
    return detect_tool_format(ChatTemplate(source), {}, VARIABLES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_format_is_detected_by_what_the_template_writes(name):
    found = detected(TEMPLATES[name])
    assert (found.name, found.native) == (name, True)


def test_a_template_with_reasoning_is_detected():
    source = TEMPLATES["hermes"].replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
    )
    assert detected(source).name == "hermes"


@pytest.mark.parametrize("source", [None, SILENT, GEMMA])
def test_templates_without_tools_get_the_plain_format(source):
    found = detect_tool_format(None if source is None else ChatTemplate(source), {}, VARIABLES)
    assert (found.name, found.native) == ("plain", False)


def test_an_unknown_format_gets_the_plain_format():
    source = TEMPLATES["hermes"].replace("tool_call>", "invented>")
    assert detected(source).name == "plain"


def test_a_template_that_only_describes_the_format_is_recognised():
    source = TEMPLATES["phi4"].replace("{%- if m.tool_calls %}", "{%- if false %}")
    assert detected(source).name == "phi4"


def test_a_template_that_rejects_the_test_gets_the_plain_format():
    assert detected("{{ raise_exception('no') }}").name == "plain"


def test_a_tokenizer_knows_its_format(smollm2_tokenizer, tiny_tokenizer):
    assert smollm2_tokenizer.tool_format.name == "plain"
    assert tiny_tokenizer.tool_format is tiny_tokenizer.tool_format


MISTRAL = TEMPLATES["mistral"].replace(
    "{%- if m.tool_calls %}",
    "{%- for c in m.tool_calls or [] %}{%- if c.id | length != 9 %}"
    "{{ raise_exception('ids have nine characters') }}{%- endif %}{{ c.id }}{%- endfor %}"
    "{{ m.tool_call_id }}{%- if m.tool_calls %}",
)
ONE_CALL = TEMPLATES["llama"].replace(
    "{%- if m.tool_calls %}",
    "{%- if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one at a time') }}"
    "{%- endif %}{%- if m.tool_calls %}",
)


def test_a_template_of_one_call_at_a_time_gets_a_grammar_of_one():
    for source, many in ((ONE_CALL, False), (TEMPLATES["llama"], True)):
        found = detected(source)
        assert (found.name, found.allows_many) == ("llama", many)
        grammar = found.grammar([tool("now")], choice="required")
        assert (grammar == found.grammar([tool("now")], choice="required", parallel=False)) != many


def test_ids_are_shortened_for_templates_that_reject_long_ones(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, MISTRAL)
    assert tokenizer.tool_format.name == "mistral"
    assert tokenizer.tool_format.short_ids
    call = calling(("now", {}), ("now", {}))
    call["tool_calls"][0]["id"] = "call_0123456789"
    messages = [user("q"), call, {"role": "tool", "tool_call_id": "call_0123456789", "content": ""}]
    found, tools = tokenizer.tool_format.prepare(messages, [tool("now")])
    short = found[1]["tool_calls"][0]["id"]
    assert found[2]["tool_call_id"] == short
    assert found[1]["tool_calls"][1]["id"] == "abcdef123"
    assert f"{short}abcdef123" in tokenizer.encode_chat(found, tools=tools).text
    assert messages[1]["tool_calls"][0]["id"] == "call_0123456789"
    assert not detected(TEMPLATES["hermes"]).short_ids
