"""Every error has OpenAI's format, from a route, the router, the JSON parser, or the HTTP layer."""

import http.client
import json
import socket

import httpx
import pytest

from easyllm.core.errors import ConfigError
from easyllm.engine import LLM
from easyllm.serve.app import create_app
from easyllm.serve.guard import MAX_BODY_BYTES
from easyllm.serve.openai.chat_request import ChatRequest
from easyllm.serve.routes import POSTS
from running_server import QUESTION, running

JSON = {"content-type": "application/json"}
CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": QUESTION, "max_tokens": 2}


@pytest.fixture(scope="module")
def llm(tiny_model, tiny_tokenizer):
    return LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")


@pytest.fixture(scope="module")
def address(llm):
    with running({"m": llm, "org/m": llm}) as address:
        yield address


def raw(address, sent):
    """Returns status, headers and body of the response to raw bytes."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(sent)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, answer.headers, answer.read()


def check_form(body, status):
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return error


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/v1/x", 404, None),
        ("POST", "/v1/edits", 404, None),
        ("GET", "/v1/models/", 404, None),
        ("GET", "/v1/models/other", 404, None),
        ("GET", "/../../etc/passwd", 404, None),
        ("GET", "/%ff%00", 404, None),
        ("GET", CHAT, 405, "POST"),
        ("PUT", CHAT, 405, "POST"),
        ("OPTIONS", CHAT, 405, "POST"),
        ("POST", "/v1/models", 405, "GET, HEAD"),
        ("DELETE", "/v1/models/m", 405, "GET, HEAD"),
        ("PUT", "/v1/responses/x", 405, "DELETE, GET, HEAD"),
        ("PATCH", "/health", 405, "GET, HEAD"),
        ("TRACE", "/", 405, "GET, HEAD"),
        ("BREW", "/health", 405, "GET, HEAD"),
    ],
)
def test_unknown_routes_and_methods_are_refused(address, method, path, status, allow):
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    got, headers, body = raw(address, head.encode())
    assert got == status
    assert headers["allow"] == allow
    check_form(body, status)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty"),
        (b" \n", "the body is empty"),
        (b"{", "not valid JSON: Expecting property name"),
        (b'{"a": 1', "not valid JSON: Expecting ',' delimiter at line 1, column 8"),
        (b'{"a": 1}\n x', "not valid JSON: Extra data at line 2, column 2"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"model": "\xff"}', "the body is not UTF-8 (byte 11)"),
        (b'{"model": "\xed\xa0\x80"}', "the body is not UTF-8"),
        ('{"model": "m"}'.encode("utf-16"), "the body is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "a number of 5000 characters"),
        (b'{"temperature": 0.' + b"9" * 5000 + b"}", "a number of 5002 characters"),
        (b'{"temperature": NaN}', "NaN is not a JSON number"),
        (b'{"temperature": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"temperature": 1e999}', "the number 1e999 in the body is too large"),
        (b'{"n": 1, "n": 2}', "the key 'n' twice"),
        (b'{"messages": [{"role": "user", "role": "system"}]}', "the key 'role' twice"),
        (b"[]", "the body is an array"),
        (b"null", "the body is null"),
        (b'"x"', "the body is a string"),
        (b"7", "the body is a number"),
        (b"true", "the body is a boolean"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_body_that_is_not_a_json_object_is_refused(address, body, message):
    answer = httpx.post(f"{address}{CHAT}", content=body, headers=JSON)
    assert answer.status_code == 400
    error = check_form(answer.text, 400)
    assert message in error["message"]
    assert error["param"] is None


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "model", "missing_required_parameter"),
        ({"model": "m"}, "messages", "missing_required_parameter"),
        ({"model": None, "messages": QUESTION}, "model", "invalid_type"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "missing_required_parameter"),
        ({"messages": [5]}, "messages.0", "invalid_type"),
        ({"messages": [[[[[]]]]]}, "messages.0", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"seed": 10**900}, "seed", "invalid_value"),
        ({"x" * 5000: 1}, "x" * 1000 + "…", "unknown_parameter"),
        ({"stop": ["a", None]}, "stop.1", "invalid_type"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_invalid_field_is_named_with_a_code(address, body, param, code):
    whole = body if not body or "model" in body else BODY | body
    answer = httpx.post(f"{address}{CHAT}", json=whole)
    assert answer.status_code == 400
    error = check_form(answer.text, 400)
    assert (error["param"], error["code"]) == (param, code)


def test_a_lone_surrogate_does_not_break_the_response(address):
    for body, status in [
        ('{"\\ud800": 1}', 400),
        ('{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}', 404),
        (json.dumps(BODY | {"logit_bias": {"\ud800": 1}}), 400),
        (json.dumps(BODY | {"messages": [{"role": "user", "content": "\ud800"}]}), 200),
    ]:
        answer = httpx.post(f"{address}{CHAT}", content=body, headers=JSON)
        assert answer.status_code == status, answer.text
        if status != 200:
            check_form(answer.text, status)


HALF = "\ud83d"
"""A text that was cut within a character."""


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": HALF, "echo": True, "max_tokens": 0}),
        ("/v1/completions", {"prompt": HALF, "echo": True, "max_tokens": 1, "stream": True}),
        ("/apply-template", {"messages": [{"role": "user", "content": HALF}]}),
        ("/v1/responses", {"input": "x", "instructions": HALF}),
        ("/v1/responses", {"input": "x", "instructions": HALF, "stream": True}),
    ],
    ids=str,
)
def test_half_of_a_character_is_repeated_as_it_was_sent(address, path, fields):
    body = {"model": "m", **fields}
    if path == "/v1/responses":
        body["max_output_tokens"] = 1
    answer = httpx.post(f"{address}{path}", content=json.dumps(body), headers=JSON)
    assert answer.status_code == 200, answer.text
    assert r"\ud83d" in answer.text
    if path == "/v1/responses" and "stream" not in fields:
        stored = httpx.get(f"{address}{path}/{answer.json()['id']}")
        assert stored.json() == answer.json()


@pytest.mark.parametrize("schema", [{"properties": {HALF: {}}}, {"const": HALF}], ids=str)
def test_a_tools_schema_with_half_of_a_character_is_refused(address, schema):
    function = {"name": "f", "parameters": {"type": "object", **schema}}
    body = BODY | {"tools": [{"type": "function", "function": function}]}
    answer = httpx.post(f"{address}{CHAT}", content=json.dumps(body), headers=JSON)
    assert answer.status_code == 400
    assert check_form(answer.text, 400)["param"] == "tools"


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": ""},
        {"content-type": "application/json; charset=utf-16"},
        JSON | {"content-encoding": "gzip"},
    ],
    ids=str,
)
def test_a_body_of_another_content_type_is_415(address, headers):
    answer = httpx.post(f"{address}{CHAT}", content=json.dumps(BODY), headers=headers)
    assert answer.status_code == 415
    check_form(answer.text, 415)


def test_a_body_without_a_content_type_is_415(address):
    """A page of another origin can make a browser send such a body without a CORS preflight."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{{}}"
    status, _, body = raw(address, head.encode())
    assert status == 415
    check_form(body, 415)


@pytest.mark.parametrize("given", ["application/json; charset=UTF-8", "Application/JSON"])
def test_all_spellings_of_the_json_content_type_are_accepted(address, given):
    answer = httpx.post(
        f"{address}{CHAT}", content=json.dumps(BODY), headers={"content-type": given}
    )
    assert answer.status_code == 200


def test_a_body_that_is_too_large_is_413(address):
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MAX_BODY_BYTES + 1}\r\n\r\n"
    )
    status, _, body = raw(address, head.encode())
    assert status == 413
    check_form(body, 413)


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # without a Host header
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 2**20,
    ],
    ids=lambda value: str(value)[:40],
)
def test_invalid_http_is_refused(address, sent):
    status, headers, body = raw(address, sent)
    assert status == 400
    assert headers["connection"] == "close"
    assert headers["x-content-type-options"] == "nosniff"
    check_form(body, 400)


def test_an_internal_error_is_500(llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "encode_chat", lambda *_, **__: 1 / 0)
    with running({"m": llm}) as address:
        answer = httpx.post(f"{address}{CHAT}", json=BODY)
    assert answer.status_code == 500
    check_form(answer.text, 500)


@pytest.mark.parametrize(
    ("content", "max_tokens"),
    [("long " * 200, 2), ("y" * 100_000, 2)],
    ids=["tokens", "characters"],
)
def test_a_prompt_longer_than_the_context_has_its_error_code(address, content, max_tokens):
    body = BODY | {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
    }
    for stream in (False, True):
        answer = httpx.post(f"{address}{CHAT}", json=body | {"stream": stream})
        assert answer.status_code == 400
        error = check_form(answer.text, 400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
        assert "prompt is too long" in error["message"]  # what litellm looks for
        assert error["code"] in error["message"]  # what LangChain looks for


def test_max_tokens_beyond_the_context_is_no_error(address):
    """litellm asks for 128,000 tokens if its user names no number."""
    answer = httpx.post(f"{address}{CHAT}", json=BODY | {"max_tokens": 128_000})
    assert answer.status_code == 200
    assert answer.json()["usage"]["total_tokens"] <= 256


def test_a_request_larger_than_the_cache_has_the_same_error_code(tiny_model, tiny_tokenizer):
    small = LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="", num_pages=4, page_size=16)
    with running({"m": small}) as address:
        body = BODY | {"max_tokens": 200}
        error = check_form(httpx.post(f"{address}{CHAT}", json=body).text, 400)
        listed = httpx.get(f"{address}/v1/models").json()["data"][0]
        assert error["code"] == "context_length_exceeded"
        assert listed["max_model_len"] == 65
        body |= {"max_tokens": None, "logit_bias": {"2": -100}, "temperature": 0}
        usage = httpx.post(f"{address}{CHAT}", json=body).json()["usage"]
        assert usage["total_tokens"] == 65


# ---- routes and headers


def test_models_are_listed_with_their_context_length(address):
    listed = httpx.get(f"{address}/v1/models").json()
    assert [entry["id"] for entry in listed["data"]] == ["m", "org/m"]
    assert {entry["max_model_len"] for entry in listed["data"]} == {256}
    for entry, path in zip(listed["data"], ["m", "org%2Fm"], strict=True):
        assert httpx.get(f"{address}/v1/models/{path}").json() == entry
    answer = httpx.get(f"{address}/v1/models/other")
    error = check_form(answer.text, 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize("path", ["/health", "/", "/v1/models", "/v1/models/m", "/openapi.json"])
def test_head_is_get_without_the_body(address, path):
    head, get = httpx.head(f"{address}{path}"), httpx.get(f"{address}{path}")
    assert head.status_code == 200
    assert head.content == b""
    for name in ("content-type", "content-length"):
        assert head.headers[name] == get.headers[name]
    assert httpx.head(f"{address}{CHAT}").status_code == 405
    assert httpx.head(f"{address}/v1/models/other").status_code == 404


def test_every_response_has_the_security_headers(address):
    answers = [httpx.get(f"{address}{path}") for path in ("/", "/health", "/v1/models", "/nope")]
    answers += [httpx.post(f"{address}{CHAT}", json=BODY | {"stream": s}) for s in (False, True)]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-frame-options"] == "DENY"
    assert "'unsafe-inline'" not in answers[1].headers["content-security-policy"]


def test_openapi_documents_every_response(address, llm):
    schema = httpx.get(f"{address}/openapi.json").json()
    assert {"/health", "/metrics", "/v1/models", "/v1/models/{model_id}", *POSTS} <= set(
        schema["paths"]
    )
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            assert "422" not in responses
            for status, response in responses.items():
                if status != "200":
                    body = response["content"]["application/json"]["schema"]
                    kind = "AnthropicErrorBody" if path.startswith("/v1/messages") else "ErrorBody"
                    assert body == {"$ref": f"#/components/schemas/{kind}"}
    chat = schema["components"]["schemas"]["ChatRequest"]
    assert set(chat["properties"]) == set(ChatRequest.model_fields)
    assert chat["properties"]["model"]["enum"] == ["m", "org/m"]
    assert "401" not in schema["paths"][CHAT]["post"]["responses"]
    app = create_app({"m": llm}, api_key="k")
    guarded = app.state.describe()
    app.state.models.close()
    assert "401" in guarded["paths"][CHAT]["post"]["responses"]
    assert "401" not in guarded["paths"]["/health"]["get"]["responses"]


# ---- the API key


@pytest.fixture(scope="module")
def guarded(llm):
    with running({"m": llm}, api_key="secret") as address:
        yield address


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer secret"},
        {"Authorization": "bearer secret"},
        {"Authorization": "BEARER   secret"},
        {"X-Api-Key": "secret"},
        {"Authorization": "Bearer wrong", "X-Api-Key": "secret"},
    ],
    ids=str,
)
def test_the_key_is_accepted_in_either_header(guarded, headers):
    assert httpx.get(f"{guarded}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "secret"},
        {"Authorization": "Basic secret"},
        {"Authorization": "Bearersecret"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer secret2"},
        {"Authorization": "Bearer SECRET"},
        {"X-Api-Key": ""},
        {"X-Api-Key": "Bearer secret"},
        {"X-Api-Key": b"\xff\xfe"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m", CHAT, "/openapi.json", "/nope"])
def test_without_the_key_nothing_is_revealed(guarded, headers, path):
    answer = httpx.get(f"{guarded}{path}", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert check_form(answer.text, 401)["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", ["", "with space", "schlüssel", "line\nbreak"])
def test_a_key_that_cannot_be_sent_is_refused(llm, key):
    with pytest.raises(ConfigError, match="the API key is empty, or contains"):
        create_app({"m": llm}, api_key=key)
