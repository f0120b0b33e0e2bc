"""`/v1/messages` and `count_tokens`: the official client, streaming, refusals in its own format."""

import anthropic
import httpx
import pytest

from easyllm.engine import LLM
from running_server import running

PATH = "/v1/messages"
GREEDY = {"temperature": 0}  # the client's own parameters no longer include it
BODY = {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def llm(tiny_model, tiny_tokenizer):
    return LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")


@pytest.fixture(scope="module")
def address(llm):
    with running({"m": llm}) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def chat_text(address, messages):
    body = {"model": "m", "messages": messages, "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body).json()
    return answer["choices"][0]["message"]["content"]


def text_of(message):
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message_has_the_text_of_the_chat_dialect(address, client):
    message = client.messages.create(**BODY, system="Be terse.", extra_body=GREEDY)
    system = {"role": "system", "content": "Be terse."}
    assert text_of(message) == chat_text(address, [system, *BODY["messages"]])
    assert (message.role, message.type, message.model) == ("assistant", "message", "m")
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert message.usage.output_tokens <= 8


def test_a_stream_gives_the_same_message(client):
    whole = client.messages.create(**BODY, extra_body=GREEDY)
    with client.messages.stream(**BODY, extra_body=GREEDY) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert text_of(message) == text_of(whole)
    assert message.stop_reason == whole.stop_reason
    assert message.usage.output_tokens == whole.usage.output_tokens
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


def test_blocks_of_text_are_joined(address, client):
    blocks = [{"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}]
    messages = [{"role": "user", "content": blocks}]
    message = client.messages.create(**BODY | {"messages": messages}, extra_body=GREEDY)
    assert text_of(message) == chat_text(address, BODY["messages"])


def test_a_last_message_of_the_assistant_is_continued(client):
    whole = text_of(client.messages.create(**BODY, extra_body=GREEDY))
    begun = [*BODY["messages"], {"role": "assistant", "content": whole[:2]}]
    rest = text_of(client.messages.create(**BODY | {"messages": begun}, extra_body=GREEDY))
    ids = client.messages.count_tokens(model="m", messages=begun).input_tokens
    assert ids > client.messages.count_tokens(model="m", messages=BODY["messages"]).input_tokens - 9
    assert isinstance(rest, str)


def test_a_stop_sequence_is_named(client):
    whole = text_of(client.messages.create(**BODY | {"max_tokens": 32}, extra_body=GREEDY))
    stop = whole.strip()[2:4]
    message = client.messages.create(
        **BODY | {"max_tokens": 32}, extra_body=GREEDY, stop_sequences=[stop]
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert stop not in text_of(message)


def test_tokens_are_counted_as_in_a_message(client):
    counted = client.messages.count_tokens(model="m", messages=BODY["messages"], system="Be terse.")
    usage = client.messages.create(**BODY, system="Be terse.").usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


@pytest.mark.parametrize(
    ("changes", "status", "kind", "part"),
    [
        ({"model": "x"}, 404, "not_found_error", "'x' is not served"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"temperature": 1.5}, 400, "invalid_request_error", "temperature"),
        ({"max_tokens": "8"}, 400, "invalid_request_error", "max_tokens"),
        ({"frequency_penalty": 1}, 400, "invalid_request_error", "frequency_penalty"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "no tools"),
        ({"thinking": {"type": "enabled"}}, 400, "invalid_request_error", "budget_tokens"),
        ({"container": "c"}, 400, "invalid_request_error", "container"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "images are not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": {}}]}]},
            400,
            "invalid_request_error",
            "has no known type",
        ),
        (
            {"messages": [{"role": "user", "content": "long " * 500}]},
            400,
            "invalid_request_error",
            "context",
        ),
    ],
)
def test_errors_have_anthropics_format(address, changes, status, kind, part):
    answer = httpx.post(f"{address}{PATH}", json=BODY | changes)
    assert answer.status_code == status
    body = answer.json()
    assert body.keys() == {"type", "error"}
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert part in body["error"]["message"]


def test_errors_before_the_route_have_it_too(llm):
    with running({"m": llm}, api_key="k") as address:
        for headers, status in (({}, 401), ({"x-api-key": "k", "content-type": "text/x"}, 415)):
            answer = httpx.post(f"{address}{PATH}", content=b"{}", headers=headers)
            assert answer.status_code == status
            assert answer.json()["type"] == "error"


def test_fields_without_effect_are_accepted(client):
    plain = client.messages.create(**BODY, extra_body=GREEDY)
    message = client.messages.create(
        **BODY,
        extra_body=GREEDY,
        metadata={"user_id": "u"},
        service_tier="auto",
        thinking={"type": "disabled"},
        tools=[],
    )
    assert text_of(message) == text_of(plain)
