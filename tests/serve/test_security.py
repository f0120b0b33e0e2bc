"""What a client must not be able to do: one test for each way in."""

import json
import socket
import threading

import httpx
import pytest
from fastapi.testclient import TestClient

from easyllm.engine import LLM
from easyllm.serve.app import create_app
from easyllm.serve.guard import PUBLIC, PUBLIC_PREFIX
from easyllm.serve.routes import POSTS
from easyllm.serve.run import DEFAULT_HOST
from running_server import QUESTION, running

CHAT = "/v1/chat/completions"
ASK = {"model": "m", "messages": QUESTION, "max_tokens": 2}
BOMB = {"$defs": {"a0": {"type": "string"}}, "$ref": "#/$defs/a12"}
BOMB["$defs"] |= {
    f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i - 1}"}, "maxItems": 2**20}
    for i in range(1, 13)
}


@pytest.fixture(scope="module")
def llm(tiny_model, tiny_tokenizer):
    return LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")


@pytest.fixture(scope="module")
def address(llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "adapters"
    folder.mkdir()
    (folder.parent / "secret").mkdir()
    with running({"m": llm}, adapters_folder=folder) as address:
        yield address


def post(address, path=CHAT, **body):
    return httpx.post(f"{address}{path}", json=ASK | body, timeout=60)


def test_every_route_but_the_public_ones_needs_the_key(llm):
    with TestClient(create_app({"m": llm}, api_key="k"), base_url="http://localhost") as client:
        paths = {route.path: route.methods for route in client.app.routes}
        assert set(POSTS) < set(paths)
        for path, methods in paths.items():
            url = path.replace("{model_id:path}", "m").replace("{response_id}", "x")
            public = path in PUBLIC or path.startswith(PUBLIC_PREFIX)
            for method in methods:
                status = client.request(method, url).status_code
                assert (status != 401) == public, (method, path)
        assert client.get("/no/such/route").status_code == 401


def test_it_listens_on_the_loopback_address_unless_told_otherwise():
    assert DEFAULT_HOST == "127.0.0.1"


def test_no_other_origin_is_allowed(address):
    headers = {"Origin": "http://other.example", "Access-Control-Request-Method": "POST"}
    for answer in (
        httpx.options(f"{address}{CHAT}", headers=headers),
        httpx.get(f"{address}/v1/models", headers=headers),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_no_address_in_a_request_is_fetched(address):
    asked = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        listener.settimeout(1)

        def accept():
            try:
                listener.accept()[0].close()
                asked.set()
            except TimeoutError:
                pass

        watching = threading.Thread(target=accept)
        watching.start()
        part = {"type": "image_url", "image_url": {"url": url}}
        assert post(address, messages=[{"role": "user", "content": [part]}]).status_code == 400
        form = {"type": "json_schema", "json_schema": {"schema": {"$ref": url}}}
        assert post(address, response_format=form).status_code == 400
        schema = {"schema": {"$schema": url, "type": "object"}}
        post(address, response_format={"type": "json_schema", "json_schema": schema})
        watching.join()
    assert not asked.is_set()


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 17},
        {"n": 10**9},
        {"max_tokens": 10**9},
        {"logprobs": True, "top_logprobs": 21},
        {"stop": ["x"] * 17},
        {"stop": "x" * 1001},
        {"logit_bias": {str(i): 1 for i in range(1025)}},
        {"messages": QUESTION * 2001},
        {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]},
        {"structured_outputs": {"choice": [str(i) for i in range(5000)]}},
        {"structured_outputs": {"regex": "a" * 10_000}},
        {"thinking_token_budget": -1},
        {"cache_salt": "x" * 257},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_numbers_and_lists_are_bounded(address, fields):
    assert post(address, **fields).status_code == 400


@pytest.mark.parametrize(
    "schema",
    [
        BOMB,
        {"type": "string", "pattern": "(a{1,500}){1,500}"},
        {"type": "string", "pattern": "((((a*)*)*)*)*b"},
        {"anyOf": [{"const": str(i) * 50} for i in range(2000)]},
        {"enum": ["x" * 1000] * 100},
    ],
    ids=["nested", "counted", "stars", "any", "long"],
)
def test_a_schema_that_would_cost_much_is_refused_or_answered_in_bounded_time(address, schema):
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    answer = post(address, response_format=form, max_tokens=4)
    assert answer.status_code in (200, 400), answer.text
    assert post(address).status_code == 200  # the engine lives on


def test_a_deeply_nested_schema_is_refused(address):
    schema = {"type": "string"}
    for _ in range(500):
        schema = {"type": "array", "items": schema}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    assert post(address, response_format=form).status_code == 400


@pytest.mark.parametrize("name", ["../m", "/etc/passwd", "m/../../x", "..%2f", "m\x00", "\ud800"])
def test_a_model_name_is_never_a_path(address, name):
    body = '{"model": %s, "messages": [{"role": "user", "content": "x"}]}'
    answer = httpx.post(
        f"{address}{CHAT}",
        content=body % json.dumps(name),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 404


@pytest.mark.parametrize(
    "path", ["../secret", "/etc", "x/../../secret", "..", "no", "a\0b", "a" * 4000], ids=repr
)
def test_adapters_come_from_the_allowed_folder_only(address, llm, path):
    answer = post(
        address, "/v1/load_lora_adapter", **dict.fromkeys(ASK), lora_name="a", lora_path=path
    )
    assert answer.status_code == 404, answer.text
    with running({"m": llm}) as other:  # without a folder, from nowhere
        body = {"lora_name": "a", "lora_path": path}
        assert httpx.post(f"{other}/v1/load_lora_adapter", json=body).status_code == 403


def test_prefixes_are_shared_only_among_requests_with_the_same_salt(address):
    text = "a prompt of more than one page, " * 6

    def cached(salt):
        usage = post(address, messages=[{"role": "user", "content": text}], cache_salt=salt).json()[
            "usage"
        ]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached("a") == 0
    assert cached("a") > 0
    assert cached("b") == 0


def test_a_template_variable_cannot_run_code(address):
    for value in ("{{ 1 / 0 }}", "{% for i in range(10**9) %}{% endfor %}", "__class__"):
        answer = post(address, messages=[{"role": "user", "content": value, "name": value}])
        assert answer.status_code == 200
    answer = post(address, chat_template_kwargs={"chat_template": "{{ 1 }}"})
    assert answer.status_code == 400


def test_the_chat_template_of_a_request_is_not_accepted(address):
    assert post(address, chat_template="{{ 1 }}").status_code == 400
