"""The engine view as JSON, and the details of tokens that the page's inspector shows."""

import math
import threading
import time

import httpx
import pytest

from easyllm.engine import LLM
from easyllm.engine.pages import PagePool
from easyllm.serve.engine_view import page_map
from running_server import QUESTION, running

CHAT = "/v1/chat/completions"
ASK = {"model": "m", "messages": QUESTION, "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def llm(tiny_model, tiny_tokenizer):
    return LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="", page_size=4, num_pages=64)


@pytest.fixture(scope="module")
def address(llm):
    with running({"m": llm, "alias": llm}) as address:
        yield address


def view(address):
    (engine,) = httpx.get(f"{address}/easyllm/engine").json()["engines"]
    return engine


def test_pages_batch_and_totals_are_those_of_the_engine(address, llm):
    before = view(address)
    assert before["serves"] == ["m", "alias"]
    assert before["running"] == []
    step = llm.engine.step

    def slowly():
        time.sleep(0.02)
        return step()

    llm.engine.step = slowly
    body = ASK | {"max_tokens": 60, "ignore_eos": True, "n": 2, "temperature": 1}
    asking = threading.Thread(target=lambda: httpx.post(f"{address}{CHAT}", json=body, timeout=60))
    asking.start()
    deadline = time.monotonic() + 60
    while len((during := view(address))["running"]) < 2:
        assert time.monotonic() < deadline
    asking.join()
    llm.engine.step = step
    pages = during["pages"]
    assert pages["used"] + pages["idle"] + pages["free"] == pages["total"] == 64
    assert pages["used"] > 0
    assert pages["shared"] > 0  # both completions share the prompt
    counts = [pages["map"].count(digit) for digit in "0123"]
    assert counts == [
        *(pages["free"], pages["idle"]),
        *(pages["used"] - pages["shared"], pages["shared"]),
    ]
    first = during["running"][0]
    assert first["model"] == "m"
    assert first["computed"] <= first["tokens"]
    after = view(address)
    assert after["generated_tokens"] - before["generated_tokens"] == 120
    assert after["pages"]["used"] == 0
    again = httpx.post(f"{address}{CHAT}", json=ASK).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert view(address)["cached_tokens"] > before["cached_tokens"]


def test_a_large_pool_is_shown_in_groups():
    pool = PagePool(5000, 4)
    pages = [pool.allocate() for _ in range(3)]
    pool.share(pages[0])
    states = pool.states()
    assert [states[page] for page in pages] == [3, 2, 2]
    assert states.count(0) == 4997
    shown = page_map(states)
    assert len(shown) == 1000
    assert sorted(set(shown)) == ["0", "3"]


def test_entropy_and_what_the_form_excluded_are_reported(address):
    form = {"structured_outputs": {"choice": ["yes", "no"]}}
    body = ASK | form | {"logprobs": True, "top_logprobs": 20, "token_details": True}
    answer = httpx.post(f"{address}{CHAT}", json=body).json()
    first = answer["choices"][0]["logprobs"]["content"][0]
    others = first["top_logprobs"]
    allowed = [each for each in others if not each["removed"]]
    assert all("yes".startswith(e["token"]) or "no".startswith(e["token"]) for e in allowed)
    excluded = sum(math.exp(each["logprob"]) for each in others if each["removed"])
    assert excluded <= first["removed_mass"] + 1e-5
    assert first["removed_mass"] + math.exp(first["logprob"]) <= 1 + 1e-5
    assert 0 < first["entropy"] <= math.log(320)


def test_the_entropy_is_that_of_the_distribution(address):
    """The 20 candidates give a part of it, and the rest at most what a uniform rest would."""
    body = ASK | {"logprobs": True, "top_logprobs": 20, "token_details": True, "max_tokens": 60}
    answer = httpx.post(f"{address}{CHAT}", json=body).json()
    for place in answer["choices"][0]["logprobs"]["content"]:
        known = [each["logprob"] for each in place["top_logprobs"]]
        rest = 1 - sum(math.exp(value) for value in known)
        part = -sum(value * math.exp(value) for value in known)
        assert place["removed_mass"] == 0
        assert part - 1e-4 <= place["entropy"] <= part + rest * math.log(300 / rest) + 1e-4
    plain = httpx.post(f"{address}{CHAT}", json=body | {"token_details": None})
    assert "entropy" not in plain.text


def test_details_need_logprobs(address):
    answer = httpx.post(f"{address}{CHAT}", json=ASK | {"token_details": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "token_details"
