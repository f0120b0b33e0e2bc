"""Template variables of a request: passed to the template, or refused."""

import pytest

from chat_conversations import chat, with_template
from chat_templates import QWEN3
from easyllm.core.errors import DataError
from easyllm.tokenizer import ChatTemplate

SOURCE = (
    "{% if not thinking is defined %}{% set thinking = enable_thinking | default(false) %}"
    "{% endif %}{{ bos_token }}{{ thinking }}{{ options.mode if options is defined }}"
    "{% for d in documents or [] %}{{ d }}{% endfor %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ strftime_now('%Y') if date }}"
)


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return with_template(tiny_tokenizer, SOURCE)


def test_the_variables_of_a_template_are_found():
    read = {"thinking", "enable_thinking", "bos_token", "options", "documents", "messages", "date"}
    assert ChatTemplate(SOURCE).variables == read
    assert "enable_thinking" in ChatTemplate(QWEN3).variables


def test_variables_reach_the_template(tokenizer):
    given = {"enable_thinking": True, "options": {"mode": [1, None]}, "documents": ["d"]}
    text = tokenizer.encode_chat(chat("x"), template_kwargs=given).text
    assert text == "<|im_start|>True[1, None]dx"
    assert tokenizer.encode_chat(chat("x")).text == "<|im_start|>Falsex"
    assert tokenizer.encode_chat(chat("x"), template_kwargs={}).text == "<|im_start|>Falsex"


@pytest.mark.parametrize(
    "name",
    [
        *("messages", "tools", "add_generation_prompt", "continue_final_message", "bos_token"),
        *("eos_token", "image_token", "raise_exception", "namespace", "__marks", "_x", "range"),
    ],
)
def test_variables_of_easyllm_are_refused(tokenizer, name):
    with pytest.raises(DataError, match="set by easyllm"):
        tokenizer.encode_chat(chat("x"), template_kwargs={name: "y"})


def test_a_variable_that_the_template_does_not_read_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"does not read the variable 'mode' .*enable_thinking"):
        tokenizer.encode_chat(chat("x"), template_kwargs={"mode": True})


@pytest.mark.parametrize("name", ["", "a b", 3, "1x", "x" * 1000 + "-"])
def test_names_are_identifiers(tokenizer, name):
    with pytest.raises(DataError, match="is not a name") as caught:
        tokenizer.encode_chat(chat("x"), template_kwargs={name: True})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), object(), {1: 2}, {"a": {1}}, (1,), b"x", print]
)
def test_values_are_json(tokenizer, value):
    with pytest.raises(DataError, match="not plain JSON"):
        tokenizer.encode_chat(chat("x"), template_kwargs={"options": value})


def test_deep_values_are_refused(tokenizer):
    value = []
    for _ in range(100):
        value = [value]
    with pytest.raises(DataError, match="not plain JSON"):
        tokenizer.encode_chat(chat("x"), template_kwargs={"options": value})


def test_what_the_template_rejects_is_refused(tiny_tokenizer):
    source = "{% if level not in ['low'] %}{{ raise_exception('unknown level') }}{% endif %}"
    tokenizer = with_template(tiny_tokenizer, source)
    with pytest.raises(DataError, match="unknown level"):
        tokenizer.encode_chat(chat("x"), template_kwargs={"level": "high"})
