"""The history file: what is stored and found, and which files are refused."""

import sqlite3

import httpx
import pytest

from easyllm.core.errors import ConfigError
from easyllm.engine import LLM
from easyllm.serve.history import VERSION, History, RevisionConflict
from running_server import running


def conversation(id, title, *texts, updated=1):
    nodes = {str(i): {"id": str(i), "content": text} for i, text in enumerate(texts)}
    return {"id": id, "title": title, "created": 1, "updated": updated, "nodes": nodes}


def test_conversations_are_found_by_title_and_text_newest_first(tmp_path):
    history = History(tmp_path / "chats.sqlite")
    history.put("a", conversation("a", "Trip", "Hotels in PARIS", updated=2), revision=0)
    history.put("b", conversation("b", "巴黎 Paris", "100%_sure \ud83d", updated=3), revision=0)
    assert [each["id"] for each in history.search()] == ["b", "a"]
    assert [each["id"] for each in history.search(" paris ")] == ["b", "a"]
    assert [each["id"] for each in history.search("巴黎")] == ["b"]
    assert [each["id"] for each in history.search("%_s")] == ["b"]  # no pattern of SQL
    assert history.search("rome") == []


def test_a_change_of_an_older_copy_is_refused(tmp_path):
    history = History(tmp_path / "chats.sqlite")
    assert history.put("a", conversation("a", "one"), revision=0) == 1
    assert history.put("a", conversation("a", "two"), revision=1) == 2
    for old in (0, 1, 3):
        with pytest.raises(RevisionConflict):
            history.put("a", conversation("a", "three"), revision=old)
    assert history.get("a") == (2, conversation("a", "two"))
    assert history.delete("a")
    assert not history.delete("a")
    assert history.get("a") is None


def test_requests_that_are_wrong_are_refused(tiny_model, tiny_tokenizer, tmp_path):
    llm = LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")
    history = History(tmp_path / "chats.sqlite")
    with running({"m": llm}, history=history, api_key="k") as address:
        client = httpx.Client(base_url=f"{address}/easyllm", headers={"X-Api-Key": "k"})
        body = {"revision": 0, "conversation": conversation("a", "one")}
        assert httpx.get(f"{address}/easyllm/history").status_code == 401
        assert client.put("/history/b", json=body).json()["error"]["param"] == "conversation"
        assert client.put("/history/a!", json=body).status_code == 400
        assert client.put("/history/a", json=body | {"revision": -1}).status_code == 400
        assert client.put("/history/a", json=body | {"x": 1}).status_code == 400
        assert client.get("/history/a").status_code == 404
        assert client.put("/history/a", json=body).json() == {"revision": 1}
        assert client.get("/page").json() == {"history": True, "documents": False}
        client.close()


def test_a_history_of_another_version_or_program_is_refused_by_name(tmp_path):
    path = tmp_path / "chats.sqlite"
    History(path).close()
    with sqlite3.connect(path) as sql:
        sql.execute(f"PRAGMA user_version = {VERSION + 6}")
    sql.close()
    with pytest.raises(ConfigError, match=r"chats\.sqlite.*version 7.*reads version 1"):
        History(path)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as sql:
        sql.execute("CREATE TABLE t (a)")
    sql.close()
    with pytest.raises(ConfigError, match="another program's database"):
        History(other)
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to be read as the header of one\n" * 20)
    with pytest.raises(ConfigError, match="cannot be used as a history"):
        History(text)
    assert text.read_text().startswith("not a database")
