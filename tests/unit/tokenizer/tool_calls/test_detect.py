"""The format of tool calls that a chat template writes."""

import pytest

from chat_templates import GEMMA
from easyllm.tokenizer import ChatTemplate
from easyllm.tokenizer.tool_calls import detect_tool_format
from tool_templates import SILENT, TEMPLATES

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
