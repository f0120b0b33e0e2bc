"""Templates that need the arguments of tool calls as text, and those that need an object."""

import pytest

from chat_conversations import with_template
from chat_templates import GLM, LLAMA3, MISTRAL, QWEN3
from conversation_rows import user
from easyllm.tokenizer import ChatTemplate
from easyllm.tokenizer.argument_text import needs_text
from tool_templates import TEMPLATES, calling

JOINING = TEMPLATES["deepseek_v31"]
PRINTING = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments }}}'
    "{% endfor %}{% endfor %}"
)


def needs(source):
    template = ChatTemplate(source)
    return needs_text(lambda messages: template._render(messages=messages, tools=None)[0])


@pytest.mark.parametrize("source", [JOINING, PRINTING])
def test_templates_that_write_arguments_as_they_are_get_text(tiny_tokenizer, source):
    assert needs(source)
    tokenizer = with_template(tiny_tokenizer, source)
    messages = [user("q"), calling(("f", {"a": [1, True], "b": "é<|im_end|>"}))]
    encoded = tokenizer.encode_chat(messages, with_mask=True)
    assert '{"a": [1, true], "b": "é<|im_end|>"}' in encoded.text
    assert encoded.text == ChatTemplate(source).render(messages)


@pytest.mark.parametrize("source", [QWEN3, LLAMA3, MISTRAL, GLM, TEMPLATES["glm45"]])
def test_other_templates_get_objects(source):
    assert not needs(source)


def test_templates_that_write_no_calls_get_objects():
    assert not needs("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert not needs("{{ raise_exception('no') }}")
