"""`/openapi.json` describes every field of requests and responses."""

import httpx
import jsonschema
import pytest

from easyllm.engine import LLM, SamplingParams
from easyllm.serve.answer_schemas import ANSWERS
from easyllm.serve.app import create_app
from easyllm.serve.openai.chat_request import ChatRequest
from running_server import QUESTION, running
from tiny_models import build_tiny


@pytest.fixture(scope="module")
def schemas(tiny_model, tiny_tokenizer):
    llm = LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")
    return create_app({"m": llm}).state.describe()["components"]["schemas"]


def test_every_route_is_described_and_no_other(tiny_model, tiny_tokenizer):
    app = create_app({"m": LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")})
    described = {
        (path, method.upper())
        for path, operations in app.state.describe()["paths"].items()
        for method in operations
    }
    served = {
        (route.path.replace(":path", ""), method)
        for route in app.routes
        for method in route.methods - {"HEAD"}
    }
    page = ("/", "/openapi.json", "/assets/{name}", "/easyllm/page", "/easyllm/engine")
    assert served - described == {(path, "GET") for path in page}
    assert described < served


def test_every_field_has_a_description(schemas):
    assert {"ChatRequest", "ChatMessage", "ChatCompletion", "ErrorBody"} <= schemas.keys()
    bare = [
        f"{name}.{field}"
        for name, schema in schemas.items()
        for field, values in schema["properties"].items()
        if not values.get("description", "").endswith(".")
    ]
    assert not bare


def test_fields_shared_with_the_engine_have_its_descriptions(schemas):
    fields = schemas["ChatRequest"]["properties"]
    shared = {"temperature", "top_p", "seed", "max_tokens", "frequency_penalty", "logit_bias", "n"}
    for name in shared:
        description = SamplingParams.model_fields[name].description
        assert fields[name]["description"].startswith(description)


def test_defaults_named_in_descriptions_are_those_of_requests():
    params = ChatRequest(model="m", messages=[{"role": "user", "content": "x"}]).sampling()
    for name, field in ChatRequest.model_fields.items():
        _, by_default, value = (field.description or "").partition(" By default ")
        if by_default and name in SamplingParams.model_fields and value[0].isdigit():
            assert getattr(params, name) == float(value.removesuffix("."))


def test_markers_describe_fields_that_are_refused_or_have_no_effect(schemas):
    fields = schemas["ChatRequest"]["properties"]
    assert fields["audio"]["description"] == "Rejected: audio is not supported."
    assert fields["store"]["description"] == (
        "Has no effect: completions are not stored. Accepted: false."
    )


CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
CHAT = {"model": "m", "messages": QUESTION, "max_tokens": 40, "temperature": 0}
TOOL = {"type": "function", "function": {"name": "look", "parameters": CITY}}
RESPONSE = {"model": "m", "input": "hello", "max_output_tokens": 40, "temperature": 0}
MESSAGE = {"model": "m", "messages": QUESTION, "max_tokens": 40}
BODIES = {
    "/v1/chat/completions": [
        CHAT | {"n": 2, "logprobs": True, "top_logprobs": 2, "service_tier": "auto"},
        CHAT | {"tools": [TOOL], "tool_choice": "required"},
    ],
    "/v1/completions": [
        {"model": "m", "prompt": ["a", "b"], "echo": True, "logprobs": 2, "max_tokens": 3},
        {"model": "m", "prompt": [3, 4], "max_tokens": 40},
    ],
    "/v1/embeddings": [
        {"model": "m", "input": ["a", "b"]},
        {"model": "m", "input": "a", "encoding_format": "base64"},
    ],
    "/v1/responses": [
        RESPONSE | {"top_logprobs": 2, "metadata": {"a": "b"}, "instructions": "Be terse."},
        RESPONSE | {"max_output_tokens": 1},
        RESPONSE
        | {
            "tools": [{"type": "function", "name": "look", "parameters": CITY}],
            "tool_choice": {"type": "function", "name": "look"},
            "reasoning": {"effort": "low"},
        },
        RESPONSE | {"text": {"format": {"type": "json_schema", "name": "city", "schema": CITY}}},
    ],
    "/v1/messages": [
        MESSAGE,
        MESSAGE
        | {"tools": [{"name": "look", "input_schema": CITY}], "tool_choice": {"type": "any"}},
    ],
    "/v1/messages/count_tokens": [{"model": "m", "messages": QUESTION}],
    "/tokenize": [{"prompt": "a b"}, {"messages": QUESTION, "return_token_strs": True}],
    "/detokenize": [{"tokens": [3, 4]}],
    "/apply-template": [{"messages": QUESTION}],
    "/models/load": [{"model": "m"}],
}
OTHER = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/models/unload"}
"""Routes whose responses need an adapter, or a model that can be loaded again."""


@pytest.fixture(scope="module")
def server(tiny_tokenizer):
    model = build_tiny(max_position_embeddings=4096)  # tools take many tokens
    llm = LLM(model=model, tokenizer=tiny_tokenizer, source="")
    with running({"m": llm}) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


def validate(answer, path, described, method="post"):
    assert answer.status_code == 200, answer.text
    content = described["paths"][path][method]["responses"]["200"]["content"]
    schema = content["application/json"]["schema"]
    jsonschema.validate(answer.json(), schema | {"components": described["components"]})


def test_responses_have_the_described_form(server):
    described = server.get("/openapi.json").json()
    for path, bodies in BODIES.items():
        for body in bodies:
            validate(server.post(path, json=body), path, described)
    posts = {path for method, path in ANSWERS if method == "post"}
    assert posts == BODIES.keys() | OTHER
    validate(server.get("/tokenizer_info"), "/tokenizer_info", described, "get")
    for path in ("/v1/models", "/health"):
        validate(server.get(path), path, described, "get")
    kept = server.post("/v1/responses", json=RESPONSE).json()["id"]
    path = "/v1/responses/{response_id}"
    validate(server.get(f"/v1/responses/{kept}"), path, described, "get")
    items = f"{path}/input_items"
    validate(server.get(items.format(response_id=kept)), items, described, "get")
    validate(server.delete(f"/v1/responses/{kept}"), path, described, "delete")


def test_descriptions_of_requests_contain_the_constraints_between_fields(schemas):
    """Bodies that the server refuses because of two fields together, or of a part of one."""
    for name, good, changes in (
        ("ChatRequest", CHAT, {"stream_options": {}}),
        ("ChatRequest", CHAT, {"max_completion_tokens": 3}),
        ("ChatRequest", CHAT, {"top_logprobs": 2}),
        ("ChatRequest", CHAT, {"continue_final_message": True}),
        ("ChatRequest", CHAT, {"response_format": {"type": "json_schema"}}),
        ("ChatRequest", CHAT, {"structured_outputs": {"regex": "a", "grammar": "b"}}),
        ("CompletionRequest", {"model": "m", "prompt": "a"}, {"max_tokens": 0}),
        ("CompletionRequest", {"model": "m", "prompt": "a"}, {"stream_options": {}}),
        (
            "CompletionRequest",
            {"model": "m", "prompt": "a"},
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        ),
        ("ResponseRequest", RESPONSE, {"input": [{"role": "user", "content": [{"type": {}}]}]}),
        ("ResponseRequest", RESPONSE, {"text": {"format": {"type": "json_schema"}}}),
        ("ResponseRequest", RESPONSE, {"tool_choice": "required"}),
        ("MessagesRequest", MESSAGE, {"thinking": {"type": "enabled"}}),
        ("MessagesRequest", MESSAGE, {"tool_choice": {"type": "any"}}),
        ("MessagesRequest", MESSAGE, {"context_management": "all"}),
        ("MessagesRequest", MESSAGE, {"system": [{"type": "image"}]}),
        ("TokenizeRequest", {"prompt": "a"}, {"messages": QUESTION}),
    ):
        schema = schemas[name] | {"components": {"schemas": schemas}}
        jsonschema.validate(good, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(good | changes, schema)
