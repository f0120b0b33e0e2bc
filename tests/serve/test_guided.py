"""Guided output over HTTP: `response_format`, `structured_outputs`, and what is refused."""

import json
import re

import httpx
import jsonschema
import openai
import pydantic
import pytest

from easyllm.engine import LLM
from running_server import running

ASK = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 300}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "李白"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=5)
    age: int = pydantic.Field(ge=0, le=150)


@pytest.fixture(scope="module")
def address(tiny_model, tiny_tokenizer):
    with running({"m": LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")}) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(address, **fields):
    return httpx.post(f"{address}/v1/chat/completions", json={**ASK, **fields}, timeout=60)


def text_of(answer):
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    return answer.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("seed", range(3))
def test_a_schema_is_followed_in_every_dialect(address, client, seed):
    form = {"type": "json_schema", "json_schema": {"name": "f", "schema": SCHEMA, "strict": True}}
    jsonschema.validate(json.loads(text_of(ask(address, response_format=form, seed=seed))), SCHEMA)
    body = {**ASK, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    message = httpx.post(f"{address}/v1/messages", json=body).json()
    jsonschema.validate(json.loads(message["content"][0]["text"]), SCHEMA)
    response = client.responses.create(
        model="m",
        input="hello",
        text={"format": {"type": "json_schema", "name": "f", "schema": SCHEMA}},
    )
    jsonschema.validate(json.loads(response.output_text), SCHEMA)
    completion = client.completions.create(
        model="m", prompt="x", max_tokens=300, extra_body={"response_format": form}
    )
    jsonschema.validate(json.loads(completion.choices[0].text), SCHEMA)


def test_the_official_clients_parse_gives_an_object(client):
    answer = client.chat.completions.parse(**ASK, response_format=Person)
    assert 0 <= answer.choices[0].message.parsed.age <= 150
    response = client.responses.parse(
        model="m", input="hello", text_format=Person, max_output_tokens=300
    )
    assert 0 <= response.output_parsed.age <= 150


def test_the_other_forms_are_followed(address):
    def guided(**options):
        return text_of(ask(address, structured_outputs=options))

    assert re.fullmatch("[0-9]{4}-[a-c]+x", guided(regex="[0-9]{4}-[a-c]{1,9}x"))
    assert guided(choice=["yes", "没有"]) in ("yes", "没有")
    assert guided(grammar='start: "a" "b"~2..3') in ("abb", "abbb")
    assert json.loads(guided(json=SCHEMA))["name"] in ("Ada", "李白")
    assert json.loads(guided(json=json.dumps(SCHEMA)))["name"] in ("Ada", "李白")


def test_a_stream_gives_the_same_text(address):
    form = {"type": "json_schema", "json_schema": {"name": "f", "schema": SCHEMA}}
    whole = text_of(ask(address, response_format=form, seed=4))
    lines = ask(address, response_format=form, seed=4, stream=True).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == whole


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
            "not",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"$ref": "https://other.example/schema"}},
                }
            },
            "response_format",
            "$ref",
        ),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", ""),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs", ""),
        ({"structured_outputs": {"grammar": "nonsense"}}, "structured_outputs", ""),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", ""),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", ""),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", ""),
        ({"response_format": {"type": "grammar"}}, "response_format.type", ""),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(address, fields, param, part):
    answer = ask(address, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert part in error["message"]


def test_log_probabilities_include_special_tokens_that_the_text_has(address):
    fields = {"skip_special_tokens": False, "logit_bias": {"1": 100}, "max_tokens": 2}
    choice = ask(address, **fields, temperature=0, logprobs=True).json()["choices"][0]
    assert choice["message"]["content"] == "<|im_start|>" * 2
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["<|im_start|>"] * 2


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_a_guide_with_ignore_eos_is_refused(address, route):
    body = {**ASK, "prompt": "x", "structured_outputs": {"choice": ["a"]}, "ignore_eos": True}
    del body["messages" if route == "completions" else "prompt"]
    answer = httpx.post(f"{address}/v1/{route}", json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "ignore_eos"


def test_the_engine_lives_on_after_a_bad_schema(address):
    for schema in ({"type": "nothing"}, {"type": []}, {"properties": 5}, {"enum": []}):
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        assert ask(address, response_format=form).status_code == 400
    assert ask(address, max_tokens=2).status_code == 200


def test_a_plain_request_does_not_prepare_guided_decoding(tiny_model, tiny_tokenizer):
    llm = LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")
    with running({"m": llm}) as address:
        assert ask(address, max_tokens=2).status_code == 200
        assert "guides" not in vars(llm)
        guided = {"max_tokens": 2, "response_format": {"type": "json_object"}}
        assert ask(address, **guided).status_code == 200
        assert "guides" in vars(llm)
