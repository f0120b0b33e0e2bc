"""`/v1/responses`: the official client, streaming, continued conversations, refusals."""

import httpx
import openai
import pytest

from easyllm.engine import LLM
from easyllm.serve.errors import APIError
from easyllm.serve.responses.store import ResponseStore
from running_server import running

PATH = "/v1/responses"
ASK = {"model": "m", "input": "hello", "temperature": 0, "max_output_tokens": 8}


@pytest.fixture(scope="module")
def address(tiny_model, tiny_tokenizer):
    with running({"m": LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")}) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat_text(address, messages, **fields):
    body = {"model": "m", "messages": messages, "max_tokens": 8, "temperature": 0, **fields}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body).json()
    return answer["choices"][0]["message"]["content"]


def user(text):
    return {"role": "user", "content": text}


def test_a_response_has_the_text_of_the_chat_dialect(address, client):
    response = client.responses.create(**ASK, instructions="Be terse.")
    system = {"role": "system", "content": "Be terse."}
    assert response.output_text == chat_text(address, [system, user("hello")])
    assert response.status in ("completed", "incomplete")
    assert (response.incomplete_details is None) == (response.status == "completed")
    assert response.usage.output_tokens <= 8


def test_input_items_are_the_messages_of_the_chat_dialect(address, client):
    items = [
        {"role": "developer", "content": "Be terse."},
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {"type": "message", "role": "assistant", "content": "hi"},
        {"role": "user", "content": "more"},
    ]
    response = client.responses.create(**ASK | {"input": items})
    system = {"role": "system", "content": "Be terse."}
    talk = [system, user("hello"), {"role": "assistant", "content": "hi"}, user("more")]
    assert response.output_text == chat_text(address, talk)


def test_a_stream_ends_with_the_same_response(client):
    whole = client.responses.create(**ASK)
    events = list(client.responses.create(**ASK, stream=True))
    final = events[-1].response
    assert final.output_text == whole.output_text
    assert final.status == whole.status
    assert final.usage.output_tokens == whole.usage.output_tokens
    numbers = [event.sequence_number for event in events if hasattr(event, "sequence_number")]
    assert numbers == sorted(numbers)
    assert events[0].type == "response.created"
    assert events[-1].type == f"response.{whole.status}"


def test_a_stored_response_is_continued(address, client):
    first = client.responses.create(**ASK)
    second = client.responses.create(**ASK | {"input": "more"}, previous_response_id=first.id)
    talk = [user("hello"), {"role": "assistant", "content": first.output_text}, user("more")]
    assert second.output_text == chat_text(address, talk)
    third = client.responses.create(**ASK | {"input": "and"}, previous_response_id=second.id)
    talk += [{"role": "assistant", "content": second.output_text}, user("and")]
    assert third.output_text == chat_text(address, talk)


def test_a_streamed_response_is_stored_too(client):
    *_, last = client.responses.create(**ASK, stream=True)
    first = last.response
    assert client.responses.retrieve(first.id).output_text == first.output_text


def test_an_item_may_be_named_instead_of_sent(address, client):
    first = client.responses.create(**ASK)
    items = [user("hello"), {"type": "item_reference", "id": first.output[0].id}, user("more")]
    second = client.responses.create(**ASK | {"input": items})
    talk = [user("hello"), {"role": "assistant", "content": first.output_text}, user("more")]
    assert second.output_text == chat_text(address, talk)


def test_stored_responses_can_be_read_and_deleted(client):
    response = client.responses.create(**ASK)
    assert client.responses.retrieve(response.id).output_text == response.output_text
    items = client.responses.input_items.list(response.id)
    assert items.data[0].content == "hello"
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_a_response_that_is_not_stored_cannot_be_continued(client):
    response = client.responses.create(**ASK, store=False)
    with pytest.raises(openai.NotFoundError) as refused:
        client.responses.create(**ASK, previous_response_id=response.id)
    assert refused.value.param == "previous_response_id"


def test_log_probabilities_belong_to_the_text(client):
    response = client.responses.create(
        **ASK, include=["message.output_text.logprobs"], top_logprobs=2
    )
    part = response.output[0].content[0]
    joined = b"".join(bytes(token.bytes) for token in part.logprobs)
    assert joined.decode(errors="replace") == part.text
    assert all(len(token.top_logprobs) == 2 for token in part.logprobs)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "image_generation_call"}]}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input"),
        ({"input": [user([{"type": "input_image", "image_url": "x"}])]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": {}}]}]}, "input"),
        ({"input": [{"type": []}]}, "input"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input"),
        ({"truncation": "auto"}, "truncation"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"input": "long " * 500}, "input"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(address, changes, param):
    answer = httpx.post(f"{address}{PATH}", json=ASK | changes)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def body_of(number, text="x"):
    return {"id": f"r{number}", "output": [{"id": f"i{number}", "text": text}]}


def test_the_store_is_bounded_in_number_and_size():
    store = ResponseStore(max_responses=2, max_bytes=400)
    for number in range(3):
        store.add(body_of(number), [])
    with pytest.raises(APIError):
        store.get("r0")
    assert store.get("r2").body == body_of(2)
    store.add(body_of(3, "y" * 300), [])
    with pytest.raises(APIError):
        store.get("r2")
    store.add(body_of(4, "y" * 500), [])
    assert store.get("r3").body["id"] == "r3"
    with pytest.raises(APIError):
        store.get("r4")
    with pytest.raises(APIError):
        store.resolve([{"type": "item_reference", "id": "i0"}])
