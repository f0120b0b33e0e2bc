"""A server with an index: its routes, and questions of every dialect answered from passages."""

import httpx
import pytest

from chat_page import DONE, SHORT, ready, send, wait_for_texts
from easyllm.embed.embedder import embedder_of
from easyllm.engine import LLM
from easyllm.retrieval.ask_config import AskConfig
from easyllm.retrieval.build import build_index
from easyllm.retrieval.index import Index
from easyllm.retrieval.search import Retriever
from easyllm.serve.documents import Documents
from running_server import running

TEXT = "The tea house opened in 1905."


@pytest.fixture(scope="module")
def llm(tiny_model, tiny_tokenizer):
    return LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")


@pytest.fixture(scope="module")
def address(tmp_path_factory, llm, tiny_model, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("docs")
    (folder / "a.txt").write_text(TEXT)
    embedder = embedder_of(tiny_model, tiny_tokenizer, name="tiny")
    out = tmp_path_factory.mktemp("index") / "i"
    build_index(folder, out, embedder)
    documents = Documents(
        Retriever(Index(out), embedder), AskConfig(passages=1, max_tokens=4, prompt="full")
    )
    with running({"m": llm}, documents=documents) as address:
        yield address


@pytest.fixture
def prompts(llm, monkeypatch):
    """The messages that reach the chat template."""
    seen, real = [], llm.tokenizer.encode_chat
    monkeypatch.setattr(
        llm.tokenizer,
        "encode_chat",
        lambda messages, **k: (seen.append(messages), real([messages[-1] | {"content": "x"}], **k))[
            1
        ],
    )
    return seen


def test_documents_and_passages_are_listed(address):
    listing = httpx.get(f"{address}/v1/rag/documents").json()
    assert listing["data"] == [{"name": "a.txt", "chunks": 1}]
    found = httpx.post(f"{address}/v1/rag/search", json={"query": "tea house"}).json()["data"]
    assert (found[0]["text"], found[0]["document"]) == (TEXT, "a.txt")
    refused = httpx.post(f"{address}/v1/rag/search", json={"query": "tea", "top": 1})
    assert refused.status_code == 400


def test_the_routes_are_described(address):
    found = httpx.get(f"{address}/openapi.json", timeout=60).json()
    assert {"/v1/rag/ask", "/v1/rag/search", "/v1/rag/documents"} <= found["paths"].keys()
    assert "question" in found["components"]["schemas"]["AskRequest"]["properties"]


def test_an_answer_comes_with_citations(address, prompts):
    body = {"question": "When did the tea house open?"}
    found = httpx.post(f"{address}/v1/rag/ask", json=body, timeout=60).json()
    assert found["object"] == "rag.answer"
    assert found["passages"][0]["document"] == "a.txt"
    assert {"verdict", "citations", "text"} <= found.keys()
    assert TEXT in prompts[0][-1]["content"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "tea?"}]}),
        ("messages", {"messages": [{"role": "user", "content": "tea?"}]}),
        ("responses", {"input": "tea?"}),
    ],
)
def test_questions_of_every_dialect_are_asked_with_their_passages(address, prompts, path, body):
    limit = "max_output_tokens" if path == "responses" else "max_tokens"
    done = httpx.post(f"{address}/v1/{path}", json={"model": "m", limit: 16, **body}, timeout=60)
    assert done.status_code == 200, done.text
    system, user = prompts[0]
    assert system["role"] == "system"
    assert TEXT in user["content"]
    assert user["content"].endswith("Question: tea?")


def test_an_instruction_of_the_client_stays_first(address, prompts):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "tea?"}]
    body = {"model": "m", "messages": messages, "max_tokens": 2}
    httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
    assert prompts[0][0]["content"].startswith("Be brief.\n\n")


def test_a_server_without_an_index_has_none_of_its_routes(llm):
    with running({"m": llm}) as address:
        assert httpx.post(f"{address}/v1/rag/ask", json={"question": "x"}).status_code == 404
        assert httpx.get(f"{address}/v1/rag/documents").status_code == 404


@pytest.mark.browser
def test_the_page_shows_the_documents_and_the_passages_of_a_question(browser, address, prompts):
    with browser.page(f"{address}/?lang=en", settings=SHORT) as page:
        send(page, "When did the tea house open?", "m")
        page.wait_for(f"document.querySelector('{DONE}')")
        page.wait_for("!document.querySelector('#documents-button').hidden")
        page.click("#documents-button")
        wait_for_texts(page, "#documents-list .name", ["a.txt"])
        wait_for_texts(page, ".passage p:not(.hint)", [TEXT])
        page.click("#documents-panel .close")
        assert page.evaluate("document.querySelector('#documents-panel').hidden")
        assert page.errors == []


@pytest.mark.browser
def test_the_page_of_a_server_without_an_index_has_no_documents(browser, llm):
    with running({"m": llm}) as address, browser.page(f"{address}/?lang=en") as page:
        ready(page, "m")
        page.wait_for("document.querySelector('#place').innerText")
        assert page.evaluate("document.querySelector('#documents-button').hidden")
