"""The reasoning of a model: its marks, its switch, and whether the prompt has opened it."""

import pytest

from chat_conversations import chat, with_template
from chat_templates import DEEPSEEK, GLM, LLAMA3, QWEN3
from easyllm.tokenizer import ChatTemplate
from easyllm.tokenizer.reasoning import MARKS, detect_reasoning
from tiny_models import CHATML

OPENING = CHATML.replace(
    "'<|im_start|>assistant\\n'",
    "'<|im_start|>assistant\\n' + ('<think>\\n' if thinking | default(false) else '</think>')",
)
GLM45 = GLM.replace(
    "{{- '/nothink' if",
    "{{- '/nothink' if (enable_thinking is defined and not enable_thinking) and",
)


def detected(source, **added):
    return detect_reasoning(ChatTemplate(source), added, {"bos_token": "<s>"})


@pytest.mark.parametrize(
    ("source", "switch", "on_by_default"),
    [
        (QWEN3, "enable_thinking", True),
        (OPENING, "thinking", False),
        (GLM45, "enable_thinking", True),
        (DEEPSEEK, None, True),
    ],
    ids=["qwen3", "off by default", "glm", "deepseek"],
)
def test_marks_and_switch_are_found(source, switch, on_by_default):
    found = detected(source)
    assert (found.open, found.close) == ("<think>", "</think>")
    assert (found.switch, found.on_by_default) == (switch, on_by_default)


def test_templates_without_reasoning_have_none():
    assert detected(CHATML) is None
    assert detected(LLAMA3) is None


@pytest.mark.parametrize("marks", MARKS)
def test_the_marks_of_each_family_are_known(marks):
    opening, closing = marks
    source = f"{{{{ '{opening}' }}}}{{{{ messages[0].content }}}}{{{{ '{closing}' }}}}"
    found = detect_reasoning(ChatTemplate(source), {closing: 7, "x": 8}, {})
    assert (found.open, found.close, found.ids) == (opening, closing, {closing: 7})


def test_variables_switch_the_reasoning():
    qwen3, opening, deepseek = detected(QWEN3), detected(OPENING), detected(DEEPSEEK)
    assert qwen3.template_kwargs(True) == {}
    assert qwen3.template_kwargs(False) == {"enable_thinking": False}
    assert opening.template_kwargs(True) == {"thinking": True}
    assert opening.template_kwargs(False) == {}
    assert deepseek.template_kwargs(True) == {}
    assert deepseek.template_kwargs(False) is None


def test_an_open_prompt_is_recognised(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, OPENING)
    for on in (True, False):
        variables = tokenizer.reasoning.template_kwargs(on)
        text = tokenizer.encode_chat(
            chat("q"), add_generation_prompt=True, template_kwargs=variables
        ).text
        assert tokenizer.reasoning.is_open(text) == on


def test_a_continued_message_may_be_in_the_reasoning():
    reasoning = detected(QWEN3)
    assert reasoning.is_open("...", "<think>\nhm")
    assert not reasoning.is_open("...", "<think>\nhm</think>four")
    assert not reasoning.is_open("...", "four")
    assert reasoning.is_open("...", "<think>a</think><think>b")


def test_a_users_mark_does_not_open_the_reasoning(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, QWEN3)
    text = tokenizer.encode_chat(chat("<think>"), add_generation_prompt=True).text
    assert not tokenizer.reasoning.is_open(text)


def test_a_tokenizer_knows_its_reasoning(tiny_tokenizer, smollm2_tokenizer):
    assert smollm2_tokenizer.reasoning is None
    tokenizer = with_template(tiny_tokenizer, QWEN3, "<think>")
    assert tokenizer.reasoning.ids == {"<think>": tokenizer.id_of("<think>")}
