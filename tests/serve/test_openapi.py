"""`/openapi.json` describes every field of requests and responses."""

import pytest

from easyllm.engine import LLM, SamplingParams
from easyllm.serve.app import create_app
from easyllm.serve.openai.chat_request import ChatRequest


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
    assert served - described == {("/", "GET"), ("/openapi.json", "GET")}
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
