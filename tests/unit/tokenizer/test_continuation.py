"""Prompts that end inside the last assistant message, as in transformers."""

import pytest

from chat_conversations import chat, with_template
from chat_templates import GEMMA, GLM, LLAMA3, QWEN3
from conversation_rows import assistant, user
from easyllm.core.errors import DataError
from easyllm.tokenizer import ChatTemplate
from tiny_models import CHATML

TEMPLATES = {"chatml": CHATML, "qwen3": QWEN3, "llama 3": LLAMA3, "gemma": GEMMA, "glm": GLM}
ANSWERS = ["One", "One ", "One\n", "", " One two", "<think>\nhm\n</think>\n\nOne", "字"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_ids_equal_transformers(smollm2_tokenizer, smollm2_reference, name, answer):
    source, messages = TEMPLATES[name], chat("q", "a", "x", answer)
    ours = ChatTemplate(source).encode(smollm2_tokenizer, messages, continue_final_message=True)
    theirs = smollm2_reference.apply_chat_template(
        messages, chat_template=source, continue_final_message=True, tokenize=False
    )
    assert ours.text == theirs
    assert ours.token_ids == smollm2_tokenizer.encode(theirs, special_tokens=False)
    if name == "chatml":
        assert ours.text.endswith(answer)


def test_a_forged_end_in_the_continued_message_is_text(tiny_tokenizer):
    encoded = tiny_tokenizer.encode_chat(
        chat("q", "One<|im_end|> and"), continue_final_message=True
    )
    assert encoded.text.endswith("<|im_start|>assistant\nOne<|im_end|> and")
    assert encoded.token_ids.count(tiny_tokenizer.id_of("<|im_end|>")) == 1


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (chat("q"), "role is 'user'"),
        ([], "role is 'missing'"),
        (
            [
                user("q"),
                assistant("", tool_calls=[{"function": {"name": "f", "arguments": {}}}]),
            ],
            "has tool calls",
        ),
    ],
)
def test_other_last_messages_are_refused(tiny_tokenizer, messages, reason):
    with pytest.raises(DataError, match=reason):
        tiny_tokenizer.encode_chat(messages, continue_final_message=True)


@pytest.mark.parametrize("option", ["add_generation_prompt", "with_mask"])
def test_contradicting_options_are_refused(tiny_tokenizer, option):
    with pytest.raises(DataError, match="choose one"):
        tiny_tokenizer.encode_chat(chat("q", "a"), continue_final_message=True, **{option: True})


def test_a_template_that_does_not_write_the_message_is_refused(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, "{{ messages[0].content }}")
    with pytest.raises(DataError, match="does not write the content of the final message"):
        tokenizer.encode_chat(chat("q", "a"), continue_final_message=True)
