"""The other routes: tokens, metrics, models, hosts, and the bound on waiting requests."""

import httpx
import pytest

from easyllm.engine import LLM
from easyllm.serve.limits import ServeLimits
from running_server import QUESTION, running

CHAT = {"model": "m", "messages": QUESTION, "max_tokens": 4}


@pytest.fixture(scope="module")
def llm(tiny_model, tiny_tokenizer):
    llm = LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")
    llm.sampling_defaults = {"top_k": 1}
    return llm


@pytest.fixture(scope="module")
def address(llm):
    with running({"m": llm}) as address:
        yield address


def post(address, path, **body):
    answer = httpx.post(f"{address}{path}", json=body)
    return answer.status_code, answer.json()


def test_text_is_tokenized_and_its_tokens_are_text_again(address, llm):
    status, found = post(address, "/tokenize", prompt="hello 三", return_token_strs=True)
    assert (status, found["tokens"]) == (200, llm.encode("hello 三"))
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert post(address, "/detokenize", tokens=found["tokens"])[1] == {"prompt": "hello 三"}


def test_a_conversation_is_tokenized_as_in_a_chat(address, llm):
    ids = llm.encode_chat(QUESTION)
    assert post(address, "/tokenize", model="m", messages=QUESTION)[1]["tokens"] == ids
    status, found = post(address, "/apply-template", messages=QUESTION)
    assert status == 200
    assert llm.tokenizer.encode(found["prompt"], special_tokens=False) == ids


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "x", "messages": QUESTION}, 400),
        ("/tokenize", {"prompt": "x", "model": "y"}, 404),
        ("/detokenize", {"tokens": [2**30]}, 400),
        ("/detokenize", {"tokens": "x"}, 400),
        ("/apply-template", {"messages": []}, 400),
    ],
)
def test_what_cannot_be_tokenized_is_refused(address, path, body, status):
    assert post(address, path, **body)[0] == status


def test_the_tokenizer_is_described(address, llm):
    found = httpx.get(f"{address}/tokenizer_info").json()
    assert found["eos_token"] == llm.tokenizer.special.eos
    assert found["chat_template"] == llm.tokenizer.chat_template.source


def test_the_models_sampling_defaults_are_shown_and_honoured(address):
    entry = httpx.get(f"{address}/v1/models/m").json()
    assert entry["default_sampling"] == {"top_k": 1}

    def text(**fields):
        answer = httpx.post(f"{address}/v1/chat/completions", json=CHAT | fields)
        return answer.json()["choices"][0]["message"]["content"]

    assert text() == text(temperature=0)  # one candidate: greedy
    assert len({text(top_k=0, seed=seed) for seed in range(5)}) > 1


def test_metrics_count_requests(address):
    httpx.post(f"{address}/v1/chat/completions", json=CHAT)
    answer = httpx.get(f"{address}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'easyllm_prompt_tokens_total{model="m"}' in answer.text


def test_foreign_hosts_are_refused_unless_named(address, llm):
    foreign = {"Host": "other.example"}
    answer = httpx.get(f"{address}/v1/models", headers=foreign)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "host_not_allowed"
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:8420", "192.168.0.9:1"):
        assert httpx.get(f"{address}/v1/models", headers={"Host": host}).status_code == 200
    with running({"m": llm}, allowed_hosts=["other.example"]) as named:
        assert httpx.get(f"{named}/v1/models", headers=foreign).status_code == 200
    with running({"m": llm}, api_key="k") as keyed:
        headers = foreign | {"Authorization": "Bearer k"}
        assert httpx.get(f"{keyed}/v1/models", headers=headers).status_code == 200


def test_a_full_queue_refuses_requests(llm, monkeypatch):
    with running({"m": llm}, limits=ServeLimits(max_waiting=1)) as address:
        monkeypatch.setattr("easyllm.serve.service.EngineService.num_waiting", 1)
        for path, body in (
            ("/v1/chat/completions", CHAT),
            ("/v1/messages", CHAT),
            ("/v1/responses", {"model": "m", "input": "x"}),
        ):
            answer = httpx.post(f"{address}{path}", json=body)
            assert answer.status_code == 429
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert answer.headers["retry-after"] == "1"


def test_the_prefix_cache_is_counted_across_turns(address):
    talk = [{"role": "user", "content": "tell me a story of some length, please " * 4}]
    first = httpx.post(f"{address}/v1/chat/completions", json=CHAT | {"messages": talk}).json()
    talk += [first["choices"][0]["message"], {"role": "user", "content": "go on"}]
    second = httpx.post(f"{address}/v1/chat/completions", json=CHAT | {"messages": talk}).json()
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached < second["usage"]["prompt_tokens"]


def test_a_stream_may_carry_the_usage_so_far_in_every_chunk(address):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = CHAT | {"stream": True, "stream_options": options, "temperature": 0}
    lines = httpx.post(f"{address}/v1/chat/completions", json=body).text.splitlines()
    usages = [line for line in lines if line.startswith("data: {")]
    assert all('"usage":{"prompt_tokens":' in line for line in usages)
