"""`easyllm rag` from the command line, with a tiny embedding model."""

import json

import pytest

from easyllm.models.load import OpenSource
from easyllm_command import easyllm


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.md").write_text("# Tea\n\nThe tea house opens at seven.")
    (folder / "b.txt").write_text("The sea is deep.")
    return folder


def test_index_and_eval(docs, tiny_folder, tmp_path):
    out = tmp_path / "index"
    done = easyllm("rag", "index", docs, out, "--embedder", tiny_folder, "--json")
    assert json.loads(done.stdout)["added"] == 2, done.stderr
    rows = tmp_path / "q.jsonl"
    rows.write_text('{"question": "When does the tea house open?", "document": "a.md"}\n')
    found = json.loads(easyllm("rag", "eval", rows, "--index", out, "--json").stdout)
    assert found["recall_at_1"] == 1
    assert found["rankings"]["bm25"]["recall_at_5"] == 1
    table = easyllm("rag", "eval", rows, "--index", out).stdout
    assert "recall_at_1" in table
    assert "dense" in table
    rows.write_text('{"question": "When does the tea house open?", "document": "A.md"}\n')
    done = easyllm("rag", "eval", rows, "--index", out)
    assert done.returncode == 2
    assert "the document 'A.md', which the index does not contain (did you mean 'a.md'?)" in (
        " ".join(done.stderr.split())
    )


def test_ask_prints_an_answer_with_its_sources(docs, tiny_folder, tmp_path):
    out = tmp_path / "index"
    easyllm("rag", "index", docs, out, "--embedder", tiny_folder)
    words = ("--model", tiny_folder, "--passages", "1", "--max-tokens", "4")
    done = easyllm("rag", "ask", out, "When does the tea house open?", *words, "--json")
    found = json.loads(done.stdout)
    assert found["passages"][0]["document"] == "a.md", done.stderr
    assert found["changed"] == []
    assert found["verdict"] in ("supported", "partly supported", "not supported", "no answer")
    (docs / "a.md").write_text("# Tea\n\nClosed.")
    plain = easyllm("rag", "ask", out, "When does the tea house open?", *words)
    assert plain.returncode == 0
    assert "a.md has changed since it was indexed" in plain.stderr
    rows = tmp_path / "q.jsonl"
    rows.write_text('{"question": "When does the tea house open?", "answer": "seven"}\n')
    report = easyllm("rag", "eval", rows, "--index", out, "--model", tiny_folder, "--json")
    assert json.loads(report.stdout)["answers"]["answered"]["n"] == 1, report.stderr


def test_eval_of_squad_has_top_level_figures(tmp_path, tiny_folder):
    file = tmp_path / "s.json"
    paragraphs = [
        {"context": f"The {w} is here.", "qas": [{"question": f"Where is the {w}?"}]}
        for w in ("house", "river", "mountain")
    ]
    file.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    done = easyllm("rag", "eval", file, "--embedder", tiny_folder, "--json")
    found = json.loads(done.stdout)
    assert found["rankings"]["bm25"]["recall_at_1"] == 1
    assert {"recall_at_1", "recall_at_5", "mrr_at_10", "intervals", "n"} <= found.keys()
    low, high = found["intervals"]["recall_at_1"]
    assert 0 <= low <= found["recall_at_1"] <= high <= 1


def test_mistakes_are_one_sentence(docs, tmp_path, tiny_folder):
    out = tmp_path / "index"
    rows = tmp_path / "q.jsonl"
    rows.write_text('{"question": "Q?", "answer": "A"}\n')
    for words, reason in (
        (("index", tmp_path / "none", out), "does not exist"),
        (("index", docs, out, "--chunk-tokens", "3"), "16"),
        (("eval", rows), "--index FOLDER"),
        (("eval", rows, "--index", out), "contains no index"),
    ):
        done = easyllm("rag", *words)
        assert done.returncode == 2, (words, done.stderr)
        assert reason in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 or "Usage" in done.stderr
    assert not out.exists()


def test_mistakes_are_told_before_anything_is_loaded(docs, tmp_path, tiny_folder, monkeypatch):
    out, squad = tmp_path / "index", tmp_path / "squad.json"
    assert easyllm("rag", "index", docs, out, "--embedder", tiny_folder).returncode == 0
    answer = {"text": "deep", "answer_start": 11}
    asked = {"id": "1", "question": "How is the sea?", "answers": [answer]}
    paragraph = {"context": "The sea is deep.", "qas": [asked]}
    squad.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [paragraph]}]}))

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(OpenSource, "model", load)
    for words, said in (
        (("ask", out, " "), "the question is empty"),
        (("ask", out, "x", "--model", "nosuch"), "model 'nosuch' is not known"),
        (("ask", out, "x", "--embedder", "nosuch"), "made for embeddings are e5-small, minilm"),
        (("eval", squad, "--model", "nosuch"), "model 'nosuch' is not known"),
        (("eval", tmp_path / "nosuch.json"), "cannot be read (No such file or directory); give"),
    ):
        done = easyllm("rag", *words)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
