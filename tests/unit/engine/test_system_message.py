"""The system message of an engine: for conversations that begin with none of their own."""

import pytest

from easyllm.engine import LLM
from easyllm.serve.generate import encode
from easyllm.serve.job import Conversation, Reasoning

HI = {"role": "user", "content": "hello world"}


@pytest.mark.parametrize("role", ["system", "developer"])
def test_conversations_without_a_system_message_get_it(tiny_model, tiny_tokenizer, role):
    llm = LLM(model=tiny_model, tokenizer=tiny_tokenizer, system="fox")
    plain = LLM(model=tiny_model, tokenizer=tiny_tokenizer)
    given = [{"role": "system", "content": "fox"}, HI]
    assert llm.encode_chat([HI]) == plain.encode_chat(given) != plain.encode_chat([HI])
    own = [{"role": role, "content": "dog"}, HI]
    assert llm.encode_chat(own) == plain.encode_chat(own)


def test_the_server_adds_it_too(tiny_model, tiny_tokenizer):
    llm = LLM(model=tiny_model, tokenizer=tiny_tokenizer, system="fox")
    ids, text = encode(Conversation(messages=[HI]), Reasoning(), llm)
    assert list(ids) == llm.encode_chat([HI])
    assert "fox" in text
