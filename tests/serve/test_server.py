"""The server with a tiny model: the official client, errors, and the page."""

import json
import re
import socket
import subprocess
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from easyllm.core.errors import ConfigError
from easyllm.engine import LLM
from easyllm.serve.guard import MAX_BODY_BYTES
from easyllm.serve.run import bind
from running_server import QUESTION, running


@pytest.fixture(scope="module")
def llms(tiny_model, tiny_tokenizer):
    return {
        name: LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")
        for name in ("base", "tuned")
    }


@pytest.fixture(scope="module")
def address(llms):
    with running(llms) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_official_client_lists_models_and_chats(client):
    assert [m.id for m in client.models.list()] == ["base", "tuned"]
    answer = client.chat.completions.create(
        model="base", messages=QUESTION, max_tokens=8, temperature=0
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens <= 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streaming_gives_the_same_text_and_its_usage(client, llms):
    settings = {"model": "tuned", "messages": QUESTION, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**settings)
    chunks = list(
        client.chat.completions.create(
            **settings, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [getattr(chunks[-1].usage, name) for name in counts] == [
        getattr(whole.usage, name) for name in counts
    ]
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}


def test_the_server_renders_messages_like_the_tokenizer(client, tiny_tokenizer):
    answer = client.chat.completions.create(model="base", messages=QUESTION, max_tokens=1)
    ids = tiny_tokenizer.encode_chat(QUESTION, add_generation_prompt=True).token_ids
    assert answer.usage.prompt_tokens == len(ids)


def test_a_seed_makes_the_completion_reproducible(client):
    def ask(seed):
        return client.chat.completions.create(
            model="base", messages=QUESTION, max_tokens=16, temperature=1.0, seed=seed
        )

    first, second, other = ask(5), ask(5), ask(6)
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.choices[0].message.content != other.choices[0].message.content


def test_several_choices_with_logprobs_work_with_and_without_streaming(client, tiny_tokenizer):
    settings = {
        "model": "base",
        "messages": QUESTION,
        "max_completion_tokens": 6,
        "seed": 4,
        "n": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "presence_penalty": 0.5,
        "logit_bias": {"40": 2},
    }
    answer = client.chat.completions.create(**settings)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    for choice in answer.choices:
        pieces = [bytes(place.bytes) for place in choice.logprobs.content]
        assert b"".join(pieces).decode("utf-8", "replace") == choice.message.content
    for choice in answer.choices:
        for place in choice.logprobs.content:
            assert place.logprob <= 0
            assert len(place.top_logprobs) == 2
            assert place.top_logprobs[0].logprob >= max(
                place.logprob, place.top_logprobs[1].logprob
            )
    text, tokens, roles = {}, {}, []
    for chunk in client.chat.completions.create(**settings, stream=True):
        for choice in chunk.choices:
            roles += [choice.delta.role] if choice.delta.role else []
            text[choice.index] = text.get(choice.index, "") + (choice.delta.content or "")
            if choice.logprobs:
                found = [place.token for place in choice.logprobs.content]
                tokens[choice.index] = tokens.get(choice.index, []) + found
    assert len(roles) == 3
    for choice in answer.choices:
        assert text[choice.index] == choice.message.content
        assert tokens[choice.index] == [place.token for place in choice.logprobs.content]


def test_content_may_be_a_list_of_text_parts(client):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    a, b = (
        client.chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": content}],
            max_tokens=6,
            temperature=0,
        )
        for content in (parts, "hel\nlo")
    )
    assert a.choices[0].message.content == b.choices[0].message.content


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "gpt-5"}, 404, "the served models are base, tuned"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"n": 17}, 400, "n:"),
        ({"n": 0}, 400, "n:"),
        ({"best_of": 2}, 400, "best_of: this field is not supported"),
        ({"echo": True}, 400, "echo: this field is not supported"),
        ({"response_format": {"type": "xml"}}, 400, "response_format.type: "),
        ({"frequency_penalty": 2.5}, 400, "frequency_penalty"),
        ({"presence_penalty": -2.5}, 400, "presence_penalty"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias contains token id 99999"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs=true"),
        ({"tools": [{"type": "function"}]}, 400, "tools.0.function: this field is required"),
        ({"colour": "red"}, 400, "colour: this field is not supported"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "role"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, 400, "not both"),
        ({"stop": ""}, 400, "stop"),
        ({"messages": [{"role": "user", "content": "long " * 500}]}, 400, "context of 256"),
    ],
)
def test_an_invalid_request_is_refused_in_openais_format(address, changes, status, message):
    body = {"model": "base", "messages": QUESTION, "max_tokens": 2} | changes
    answer = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_broken_json_and_huge_bodies_are_refused(address):
    url = f"{address}/v1/chat/completions"
    assert (
        httpx.post(url, content=b"{", headers={"content-type": "application/json"}).status_code
        == 400
    )
    with socket.create_connection(address.removeprefix("http://").split(":")) as raw:
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
            f"{MAX_BODY_BYTES + 1}\r\n\r\n"
        )
        raw.sendall(head.encode())
        assert b" 413 " in raw.recv(1000)


def test_a_client_that_disconnects_frees_its_request(address, llms):
    body = {"model": "base", "messages": QUESTION, "stream": True, "temperature": 1.5, "seed": 3}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 10
    while llms["base"].engine.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not llms["base"].engine.busy
    assert llms["base"].engine.pool.available == llms["base"].engine.pool.num_pages


def test_concurrent_clients_get_the_same_completions_as_each_alone(client):
    prompts = [f"question {i} " * (i + 1) for i in range(8)]

    def ask(prompt):
        messages = [{"role": "user", "content": prompt}]
        answer = client.chat.completions.create(
            model="base", messages=messages, max_tokens=12, temperature=0
        )
        return answer.choices[0].message.content

    alone = [ask(p) for p in prompts]
    together = [None] * len(prompts)

    def worker(i):
        together[i] = ask(prompts[i])

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(len(prompts))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert together == alone


def test_a_failing_step_is_reported_and_the_engine_survives(address, llms, monkeypatch):
    runner = llms["tuned"].engine.runner
    body = {"model": "tuned", "messages": QUESTION, "max_tokens": 2}
    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", lambda step: 1 / 0)
        answer = httpx.post(f"{address}/v1/chat/completions", json=body)
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
    assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 200


def test_the_key_is_required_except_for_health_and_the_page(llms):
    with running(llms, api_key="secret") as address:
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        assert httpx.get(f"{address}/").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = httpx.get(f"{address}/v1/models", headers=headers)
            assert answer.status_code == 401
        right = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{address}/v1/models", headers=right).status_code == 200


def test_the_page_loads_no_external_resources(address):
    answer = httpx.get(address)
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    for marker in ("http://", "https://", "//cdn", "@import", "innerHTML"):
        assert marker not in answer.text, f"the page holds {marker}"


def test_a_port_in_use_is_refused():
    first = bind("127.0.0.1", 0)
    port = first.getsockname()[1]
    with pytest.raises(ConfigError, match="choose another port"):
        bind("127.0.0.1", port)
    first.close()


def test_responses_are_utf8_json(address):
    body = {"model": "base", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 4}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body | {"stream": True})
    lines = [x.removeprefix("data: ") for x in answer.text.splitlines() if x]
    assert lines[-1] == "[DONE]"
    assert all(json.loads(line)["object"] == "chat.completion.chunk" for line in lines[:-1])


def test_the_curl_example_of_the_readme_works_as_written(llms):
    """Only the port differs: the tests must not use the default one."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    command = re.search(r"```bash\n(curl .*?)```", readme, re.DOTALL).group(1)
    with running(llms) as address:
        command = command.replace("http://127.0.0.1:8420", address)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]
