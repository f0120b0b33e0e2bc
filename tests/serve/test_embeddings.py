"""`/v1/embeddings`: the official client, both encodings, refusals."""

import httpx
import numpy as np
import openai
import pytest

from easyllm.engine import LLM
from running_server import running

TEXTS = ["One text.", "Another."]


@pytest.fixture(scope="module")
def llm(tiny_model, tiny_tokenizer):
    return LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")


@pytest.fixture(scope="module")
def address(llm):
    with running({"m": llm}) as address:
        yield address


def test_the_official_client_reads_the_vectors_of_the_model(address, llm):
    wanted = llm.embed(TEXTS).numpy()
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="m", input=TEXTS)  # asked as base64
        plain = client.embeddings.create(model="m", input=TEXTS, encoding_format="float")
        last = client.embeddings.create(model="m", input=TEXTS, extra_body={"pooling": "last"})
    found = np.array([row.embedding for row in answer.data], dtype=np.float32)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_allclose([row.embedding for row in plain.data], wanted, atol=1e-6)
    vectors = llm.embed(TEXTS, pooling="last").numpy()
    np.testing.assert_allclose([row.embedding for row in last.data], vectors, atol=1e-6)
    assert answer.usage.prompt_tokens == sum(len(llm.encode(text)) for text in TEXTS)


def test_token_ids_are_accepted(address, llm):
    ids = [llm.encode(text) for text in TEXTS]
    answer = httpx.post(f"{address}/v1/embeddings", json={"model": "m", "input": ids}).json()
    found = [row["embedding"] for row in answer["data"]]
    np.testing.assert_allclose(found, llm.embed(TEXTS).numpy(), atol=1e-6)


def test_many_texts_leave_the_engine_to_others_between_groups(address, llm, monkeypatch):
    sizes = list[int]()
    embed = llm.embed

    def watched(ids, **options):
        sizes.append(sum(map(len, ids)))
        return embed(ids, **options)

    monkeypatch.setattr(llm, "embed", watched)
    most = llm.engine.options.max_step_tokens
    ids = [[1 + n % 300] * (1 + n) for n in range(100)]
    answer = httpx.post(f"{address}/v1/embeddings", json={"model": "m", "input": ids}, timeout=60)
    found = [row["embedding"] for row in answer.json()["data"]]
    np.testing.assert_allclose(found, embed(ids).numpy(), atol=1e-5)
    assert sum(sizes) == sum(map(len, ids)) > most
    assert max(sizes) <= most


@pytest.mark.parametrize("path", ["embeddings", "completions"])
def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(address, llm, monkeypatch, path):
    def encode(*_arguments, **_options):
        raise AssertionError("the text was encoded")

    monkeypatch.setattr(type(llm.tokenizer), "encode", encode)
    field = {"embeddings": "input", "completions": "prompt"}[path]
    body = {"model": "m", field: "ab" * 100_000}
    answer = httpx.post(f"{address}/v1/{path}", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (field, "context_length_exceeded")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": "long " * 500}, "input"),
        ({"input": [2**30]}, "input"),
        ({"dimensions": 3}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"pooling": "cls"}, "pooling"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(address, changes, param):
    body = {"model": "m", "input": "x"} | changes
    answer = httpx.post(f"{address}/v1/embeddings", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
