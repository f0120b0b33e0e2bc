"""Models and adapters that are loaded and unloaded while the server runs."""

import threading
import time

import httpx
import pytest

from easyllm.adapters import LoRAConfig
from easyllm.core.errors import CheckpointError
from easyllm.engine import LLM
from easyllm.serve.limits import ServeLimits
from raw_http import slow_down, wait_for
from running_server import QUESTION, running
from tiny_models import build_tiny
from trained_adapters import as_named

ASK = {"model": "m", "messages": QUESTION, "max_tokens": 4, "temperature": 0}


@pytest.fixture
def made(tiny_model, tiny_tokenizer):
    """Counts how often the model is loaded."""

    def load():
        load.count += 1
        return LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")

    load.count = 0
    return load


def ask(address, **fields):
    return httpx.post(f"{address}/v1/chat/completions", json=ASK | fields, timeout=60)


def text_of(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def unload(address):
    return httpx.post(f"{address}/models/unload", json={"model": "m"}, timeout=60)


def test_an_unloaded_model_is_loaded_by_the_next_request_and_answers_the_same(made):
    with running({"m": made()}, loaders={"m": made}) as address:
        before = text_of(ask(address))
        assert unload(address).json() == {"unloaded": "m"}
        assert httpx.get(f"{address}/v1/models").json()["data"][0]["id"] == "m"
        assert made.count == 1
        assert text_of(ask(address)) == before
        assert made.count == 2


def test_several_requests_wait_for_one_loading(made):
    with running({"m": made()}, loaders={"m": made}) as address:
        unload(address)
        texts = []
        threads = [
            threading.Thread(target=lambda: texts.append(text_of(ask(address)))) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(texts)) == 1
        assert made.count == 2


def test_running_requests_end_before_their_model_is_unloaded(made):
    with running({"m": made()}, loaders={"m": made}) as address:
        whole = text_of(ask(address, max_tokens=150))
        found = []
        asking = threading.Thread(target=lambda: found.append(ask(address, max_tokens=150)))
        asking.start()
        time.sleep(0.05)
        assert unload(address).status_code == 200
        asking.join()
        assert text_of(found[0]) == whole


def test_an_idle_model_is_unloaded(made):
    limits = ServeLimits(unload_idle_s=0.2)
    with running({"m": made()}, loaders={"m": made}, limits=limits) as address:
        text_of(ask(address))
        loaded = made.count
        time.sleep(1)
        text_of(ask(address))
        assert made.count == loaded + 1


def test_a_model_that_can_no_longer_be_loaded_is_an_error_of_the_server(made):
    def broken():
        raise CheckpointError("the file is gone")

    with running({"m": made()}, loaders={"m": broken}) as address:
        unload(address)
        answer = ask(address)
        assert answer.status_code == 500
        assert "the file is gone" in answer.json()["error"]["message"]


def test_a_model_without_a_source_stays_loaded(made):
    with running({"m": made()}) as address:
        answer = unload(address)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "model"
        assert text_of(ask(address)) is not None


def test_an_unknown_model_is_neither_loaded_nor_unloaded(made):
    with running({"m": made()}, loaders={"m": made}) as address:
        for verb in ("load", "unload"):
            answer = httpx.post(f"{address}/models/{verb}", json={"model": "x"})
            assert answer.status_code == 404


def adapter_in(folder):
    """Writes the folder of an adapter of a model like the tiny one."""
    as_named(build_tiny(), folder, LoRAConfig(rank=2, alpha=4), "written")


def load_adapter(address, name, **fields):
    body = {"lora_name": name, "lora_path": "one"} | fields
    return httpx.post(f"{address}/v1/load_lora_adapter", json=body, timeout=60)


def test_requests_of_an_unloaded_adapter_end_with_503_and_the_reason(made, tmp_path, monkeypatch):
    adapter_in(tmp_path / "one")
    llm = made()
    slow_down(llm, monkeypatch)
    with running({"m": llm}, adapters_folder=tmp_path) as address:
        assert load_adapter(address, "a").status_code == 200
        answers = {}

        def keep(name):
            answers[name] = ask(address, model=name, max_tokens=60, ignore_eos=True)

        threads = [threading.Thread(target=keep, args=(name,)) for name in ("a", "m")]
        for thread in threads:
            thread.start()
        assert wait_for(lambda: len(llm.engine.scheduler.running) == 2, 30)
        unloaded = httpx.post(f"{address}/v1/unload_lora_adapter", json={"lora_name": "a"})
        assert unloaded.status_code == 200
        for thread in threads:
            thread.join(60)
        assert answers["a"].status_code == 503
        assert "'a' was unloaded" in answers["a"].json()["error"]["message"]
        assert answers["m"].status_code == 200
