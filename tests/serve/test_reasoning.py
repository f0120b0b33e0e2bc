"""Reasoning over HTTP: in each dialect's own field, switched off, within a budget."""

import json

import httpx
import pytest

from easyllm.engine import LLM
from easyllm.tokenizer import Tokenizer
from running_server import running
from tiny_models import build_tiny

TEMPLATE = """{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% else %}<think>
{% endif %}{%- endif %}"""
ALWAYS = TEMPLATE.replace(
    "{% if enable_thinking is defined and not enable_thinking %}", "{% if false %}"
)
ASK = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}


def server(template, tokenizer):
    tokenizer = Tokenizer(tokenizer.backend, tokenizer.special, chat_template=template)
    model = build_tiny(max_position_embeddings=1024)
    return running({"m": LLM(model=model, tokenizer=tokenizer, source="")})


@pytest.fixture(scope="module")
def address(tiny_tokenizer):
    with server(TEMPLATE, tiny_tokenizer) as address:
        yield address


@pytest.fixture(scope="module")
def always(tiny_tokenizer):
    with server(ALWAYS, tiny_tokenizer) as address:
        yield address


def ask(address, path="/v1/chat/completions", **fields):
    answer = httpx.post(f"{address}{path}", json={**ASK, **fields}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_reasoning_and_answer_come_apart_within_a_budget(address):
    answer = ask(address, thinking_token_budget=5, max_tokens=30)
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"]
    assert message["content"]
    assert "think>" not in message["content"] + message["reasoning_content"]
    reasoned = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 5 <= reasoned < answer["usage"]["completion_tokens"]


def test_the_same_text_is_in_each_dialects_own_field(address):
    chat = ask(address, thinking_token_budget=256, reasoning_effort=None, max_tokens=300)
    message = chat["choices"][0]["message"]
    effort = {"reasoning": {"effort": "minimal"}, "messages": None, "input": "hello"}
    response = ask(address, "/v1/responses", **effort, max_output_tokens=300)
    kinds = {item["type"]: item["content"][0]["text"] for item in response["output"]}
    assert kinds["reasoning"] == message["reasoning_content"]
    assert kinds["message"] == message["content"]
    thinking = {"type": "enabled", "budget_tokens": 256}
    anthropic = ask(address, "/v1/messages", thinking=thinking, max_tokens=300)
    first, second = anthropic["content"]
    assert (first["type"], first["thinking"]) == ("thinking", message["reasoning_content"])
    assert (second["type"], second["text"]) == ("text", message["content"])


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "none"},
        {"thinking_token_budget": 0},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_reasoning_is_switched_off_by_the_templates_own_variable(address, fields):
    message = ask(address, max_tokens=12, **fields)["choices"][0]["message"]
    assert "reasoning_content" not in message
    assert message["content"]


def test_reasoning_that_a_template_cannot_switch_off_is_closed_at_once(always):
    answer = ask(always, reasoning_effort="none", max_tokens=30)
    message = answer["choices"][0]["message"]
    assert "reasoning_content" not in message
    assert message["content"]


def test_a_form_applies_after_the_reasoning(address):
    choice = {"choice": ["yes", "no"]}
    answer = ask(address, structured_outputs=choice, thinking_token_budget=4, max_tokens=60)
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"]
    assert message["content"] in ("yes", "no")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [0, 3])
def test_a_form_has_no_whitespace_around_it(address, always, seed, budget):
    sampled = {"temperature": 2, "seed": seed, "max_tokens": 60, "thinking_token_budget": budget}
    for server in (address, always):
        answer = ask(server, structured_outputs={"regex": "a{3}"}, **sampled)
        assert answer["choices"][0]["message"]["content"] == "aaa"


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_kept_if_asked(address, skip):
    fields = {"skip_special_tokens": skip, "logit_bias": {"1": 100}, "reasoning_effort": "none"}
    answer = ask(address, max_tokens=3, logprobs=True, **fields)
    text = answer["choices"][0]["message"]["content"]
    assert text == ("" if skip else "<|im_start|>" * 3)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == text


def test_a_stream_sends_the_reasoning_first(address):
    body = {**ASK, "stream": True, "thinking_token_budget": 5, "max_tokens": 30}
    text = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).text
    assert 0 < text.index('"reasoning_content"') < text.rindex('"content"')
    events = httpx.post(
        f"{address}/v1/messages",
        json={
            **ASK,
            "stream": True,
            "max_tokens": 300,
            "thinking": {"type": "enabled", "budget_tokens": 5},
        },
        timeout=60,
    ).text
    assert events.index('"thinking_delta"') < events.index('"signature_delta"')
    assert events.index('"signature_delta"') < events.index('"text_delta"')


@pytest.mark.parametrize("stream", [False, True])
def test_the_log_probabilities_are_those_of_the_answer_alone(always, stream):
    fields = {"thinking_token_budget": 4, "max_tokens": 60, "logprobs": True, "stream": stream}
    body = {**ASK, **fields, "structured_outputs": {"choice": ["yes", "no"]}}
    answer = httpx.post(f"{always}/v1/chat/completions", json=body, timeout=60)
    if stream:
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    else:
        choices = answer.json()["choices"]
    found = [entry for c in choices if c.get("logprobs") for entry in c["logprobs"]["content"]]
    text = "".join(c["delta" if stream else "message"].get("content") or "" for c in choices)
    assert text in ("yes", "no")
    assert bytes(byte for entry in found for byte in entry["bytes"]).decode() == text


@pytest.mark.parametrize(
    "variables",
    [{"messages": []}, {"tools": []}, {"nonsense": 1}, {"bos_token": "x"}, {"__class__": 1}],
)
def test_variables_that_a_template_does_not_read_are_refused(address, variables):
    answer = httpx.post(
        f"{address}/v1/chat/completions", json={**ASK, "chat_template_kwargs": variables}
    )
    assert answer.status_code == 400
    assert next(iter(variables)) in answer.json()["error"]["message"]
