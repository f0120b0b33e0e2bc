"""The fields of a request: honoured up to their limits, refused beyond them, none dropped."""

import httpx
import pytest
from test_server import QUESTION, running

from conftest import build_tiny
from easyllm.engine import LLM


@pytest.fixture(scope="module")
def large(tiny_tokenizer):
    """With a vocabulary large enough that top-p tries the likeliest tokens first."""
    return LLM(model=build_tiny(vocab_size=5000), tokenizer=tiny_tokenizer, source="")


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"top_k": 2**63}, 400, "top_k: Input should be less than or equal to 2147483647"),
        ({"top_k": 2**31 - 1}, 200, ""),
        ({"logit_bias": {str(2**63): 1}}, 400, "logit_bias"),
        ({"top_p": 1e-50}, 200, ""),
        ({"stop": "0123456789abcdefg"}, 200, ""),
        ({"stop": ["0123456789abcdefg"] * 16}, 200, ""),
        ({"stop": None}, 200, ""),
        ({"stop": ["a"] * 17}, 400, "stop: List should have at most 16 items"),
        ({"stop": "x" * 1001}, 400, "stop.0: String should have at most 1000 characters"),
        ({"stop": ["a", ""]}, 400, "stop.1: String should have at least 1 character"),
        ({"stop": 5}, 400, "stop: Input should be a valid list"),
    ],
    ids=str,
)
def test_values_at_their_limits_are_honoured_and_beyond_them_refused(
    large, changes, status, message
):
    body = {"model": "m", "messages": QUESTION, "max_tokens": 2} | changes
    with running({"m": large}) as address:
        answer = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert answer.status_code == status
    assert message in answer.text


def test_a_name_is_given_to_the_template(tiny_model, tiny_tokenizer):
    template = tiny_tokenizer.chat_template.source.replace(
        "message['role']", "message['role'] + (' ' + message['name'] if message.name else '')"
    )
    naming = type(tiny_tokenizer)(
        tiny_tokenizer.backend, tiny_tokenizer.special, chat_template=template
    )
    llm = LLM(model=tiny_model, tokenizer=naming, source="")
    named = [{"role": "user", "content": "hello", "name": "Ada"}]
    counts = []
    with running({"m": llm}) as address:
        for messages in (QUESTION, named):
            body = {"model": "m", "messages": messages, "max_tokens": 1}
            answer = httpx.post(f"{address}/v1/chat/completions", json=body)
            counts.append(answer.json()["usage"]["prompt_tokens"])
    assert counts == [len(llm.encode_chat(messages)) for messages in (QUESTION, named)]
    assert counts[0] < counts[1]
