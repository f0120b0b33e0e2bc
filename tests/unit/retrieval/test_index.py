"""Indexes: exact search, updates, interruptions at any step, compaction, refusals."""

import os
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest

from easyllm.core.errors import CheckpointError, ConfigError, DataError, OutputError, SourceError
from easyllm.embed.embedder import embedder_of
from easyllm.retrieval import build
from easyllm.retrieval.build import build_index, check_build
from easyllm.retrieval.chunk import ChunkConfig
from easyllm.retrieval.fuse import fuse
from easyllm.retrieval.index import INDEX_FILE, Index, read_state
from easyllm.retrieval.search import Retriever
from easyllm.retrieval.vectors import best, load_vectors, save_vectors, similarities
from tiny_models import build_tiny

TEXTS = {
    "tea.md": "# Tea\n\nGreen tea is not fermented.\n\n# Black\n\nBlack tea is fermented.",
    "sea.txt": "The sea is deep.\n\nWaves are high in winter.",
    "sub/茶.txt": "绿茶没有发酵。红茶经过发酵。",
}
SMALL = ChunkConfig(max_tokens=16)


@pytest.fixture(scope="module")
def embedder(tiny_model, tiny_tokenizer):
    return embedder_of(tiny_model, tiny_tokenizer, name="tiny")


@pytest.fixture
def place(tmp_path):
    for name, text in TEXTS.items():
        path = tmp_path / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return SimpleNamespace(docs=tmp_path / "docs", out=tmp_path / "out")


def contents(folder):
    """The live chunks of an index: document, text, and the document's text at their span."""
    index = Index(folder)
    rows = [r for s in index.segments for r in np.flatnonzero(s.live) + s.first]
    return sorted((c.document, c.start, c.text) for c in (index.chunk(int(r)) for r in rows))


def test_chunks_are_found_with_their_place(place, embedder):
    report = build_index(place.docs, place.out, embedder, SMALL)
    assert (report.added, report.chunks) == (3, len(contents(place.out)))
    retriever = Retriever(Index(place.out), embedder)
    for mode in ("fused", "dense", "bm25"):
        hit = retriever.search("Black tea is fermented.", 3, mode)[0].chunk
        assert (hit.document, hit.headings) == ("tea.md", ("Black",))
        assert TEXTS["tea.md"][hit.start : hit.end] == hit.text
    assert retriever.search("红茶", 1, "bm25")[0].chunk.document == "sub/茶.txt"
    assert retriever.search("zzz", 5, "bm25") == []
    with pytest.raises(ConfigError, match="question is empty"):
        retriever.search(" ")


def test_an_update_embeds_only_what_changed(place, embedder, monkeypatch):
    build_index(place.docs, place.out, embedder, SMALL)
    (place.docs / "sea.txt").write_text("The sea is calm.", encoding="utf-8")
    (place.docs / "new.txt").write_text("A new page.", encoding="utf-8")
    (place.docs / "tea.md").unlink()
    seen, real = [], build.split_document
    monkeypatch.setattr(
        build, "split_document", lambda text, *a, **k: (seen.append(text), real(text, *a, **k))[1]
    )
    report = build_index(place.docs, place.out, embedder)
    counts = (report.added, report.changed, report.removed, report.unchanged)
    assert counts == (1, 1, 1, 1)
    assert sorted(seen) == ["A new page.", "The sea is calm."]
    fresh = place.out.with_name("fresh")
    build_index(place.docs, fresh, embedder, SMALL)
    assert contents(place.out) == contents(fresh)
    again = build_index(place.docs, place.out, embedder)
    assert (again.unchanged, again.added, again.changed) == (3, 0, 0)


class Stop(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("step", range(6))
def test_an_index_interrupted_at_any_step_opens_and_continues(place, embedder, monkeypatch, step):
    """Every write of a file is a step; the build ends before it, as if it were killed."""
    monkeypatch.setattr(build, "GROUP_CHUNKS", 1)  # a segment for every document
    (place.docs / "sea.txt").rename(place.docs / "zz.txt")
    build_index(place.docs, place.out, embedder, SMALL)
    before = contents(place.out)
    (place.docs / "tea.md").write_text("# Tea\n\nAnother text.", encoding="utf-8")
    (place.docs / "zz.txt").unlink()
    (place.docs / "n.txt").write_text("New.", encoding="utf-8")
    left, real = [step], os.rename
    real_replace = os.replace

    def counted(rename):
        def inner(*paths):
            left[0] -= 1
            if left[0] < 0:
                raise Stop
            return rename(*paths)

        return inner

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", counted(real))
        patch.setattr(os, "replace", counted(real_replace))
        with suppress(Stop):
            build_index(place.docs, place.out, embedder)
    names = {document for document, _, _ in contents(place.out)}
    assert names <= {document for document, _, _ in before} | {"n.txt"}
    Retriever(Index(place.out), embedder).search("tea")
    build_index(place.docs, place.out, embedder)
    fresh = place.out.with_name("fresh")
    build_index(place.docs, fresh, embedder, SMALL)
    assert contents(place.out) == contents(fresh)
    state = read_state(place.out)
    assert {p.name for p in (place.out / "segments").iterdir()} == set(state.segments)


def test_compaction_keeps_chunks_and_vectors(place, embedder, monkeypatch):
    build_index(place.docs, place.out, embedder, SMALL)
    (place.docs / "tea.md").write_text("Other.", encoding="utf-8")
    monkeypatch.setattr(build, "MAX_DEAD", 0.0)
    build_index(place.docs, place.out, embedder)
    index = Index(place.out)
    assert len(index.segments) == 1
    assert index.segments[0].live.all()
    for row in range(index.num_chunks):
        vector = embedder.embed([index.chunk(row).titled])[0]
        np.testing.assert_allclose(index.vector(row), vector, atol=1e-3)
    for path in place.docs.rglob("*.*"):
        path.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="none of 3 documents"):
        build_index(place.docs, place.out, embedder)


def test_neighbours_of_a_chunk_stay_in_its_document(place, embedder):
    build_index(place.docs, place.out, embedder, SMALL)
    index = Index(place.out)
    hit = Retriever(index, embedder).search("Green tea", 1, "bm25")[0].chunk
    around = index.around(hit, 50)
    assert {c.document for c in around} == {"tea.md"}
    assert len(around) == index.state.documents["tea.md"]["count"]
    assert [c.row for c in index.around(hit, 1)] == [
        c.row for c in around if abs(c.row - hit.row) < 2
    ]
    assert index.around(hit, 0) == [hit]


def test_unreadable_files_are_reported_and_left_out(place, embedder):
    (place.docs / "bad.pdf").write_bytes(b"%PDF-1.4")
    (place.docs / "image.png").write_bytes(b"\x89PNG")
    report = build_index(place.docs, place.out, embedder, SMALL)
    assert list(report.refused) == ["bad.pdf"]
    assert (report.added, report.ignored) == (3, 1)


def test_what_does_not_fit_an_index_is_refused(place, embedder, tiny_tokenizer, tmp_path):
    build_index(place.docs, place.out, embedder, SMALL)
    other = embedder_of(build_tiny(seed=1), tiny_tokenizer, name="other")
    wider = embedder_of(build_tiny(hidden_size=48), tiny_tokenizer, name="wider")
    with pytest.raises(ConfigError, match="'other' gives other vectors"):
        build_index(place.docs, place.out, other)
    with pytest.raises(ConfigError, match=r"32 dimensions.*'wider' has 48"):
        Retriever(Index(place.out), wider)
    with pytest.raises(ConfigError, match="chunks of 16 tokens, got 32"):
        build_index(place.docs, place.out, embedder, ChunkConfig(max_tokens=32))
    with pytest.raises(ConfigError, match="was built from"):
        build_index(place.docs / "sub", place.out, embedder)
    with pytest.raises(SourceError, match="does not exist"):
        build_index(tmp_path / "none", place.out, embedder)
    with pytest.raises(SourceError, match="contains no index"):
        Index(tmp_path)


def test_a_damaged_index_is_refused(place, embedder):
    build_index(place.docs, place.out, embedder, SMALL)
    segment = next((place.out / "segments").iterdir())
    (segment / "vectors.npy").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        Index(place.out)
    (place.out / INDEX_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        Index(place.out)


def test_search_in_blocks_is_exact(tmp_path, monkeypatch):
    from easyllm.retrieval import vectors

    monkeypatch.setattr(vectors, "BLOCK_ROWS", 7)
    rows = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    query = np.random.default_rng(1).standard_normal(8).astype(np.float32)
    save_vectors(tmp_path / "v.npy", rows)
    found = similarities(load_vectors(tmp_path / "v.npy"), query)
    np.testing.assert_allclose(found, rows.astype(np.float16).astype(np.float32) @ query, atol=1e-5)
    live = np.arange(50) % 2 == 0
    order = [r for r in np.argsort(-found, kind="stable").tolist() if r % 2 == 0]
    assert [r for r, _ in best([found[:20], found[20:]], [live[:20], live[20:]], 6)] == order[:6]
    assert len(best([found], [live], 99)) == 25
    assert best([np.zeros(4, np.float32)], [np.ones(4, bool)], 2) == [(0, 0.0), (1, 0.0)]


def test_fusion_adds_reciprocal_ranks():
    assert dict(fuse([["a", "b"], ["b", "c"]])) == {
        "a": 1 / 11,
        "b": 1 / 12 + 1 / 11,
        "c": 1 / 12,
    }


def test_a_build_is_checked_without_an_embedding_model(place, embedder):
    check_build(place.docs, place.out)
    build_index(place.docs, place.out, embedder, SMALL)
    check_build(place.docs, place.out, SMALL)
    with pytest.raises(ConfigError, match="has chunks of 16 tokens, got 32"):
        check_build(place.docs, place.out, ChunkConfig(max_tokens=32))
    with pytest.raises(ConfigError, match="was built from"):
        check_build(place.docs / "sub", place.out)
    with pytest.raises(OutputError, match="not empty"):
        check_build(place.docs, place.docs)
    with pytest.raises(OutputError, match="not empty"):
        check_build(place.docs, place.docs / "tea.md")


def test_documents_without_text_are_told_once(place):
    for path in place.docs.rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"^none of 3 documents can be read: ") as raised:
        check_build(place.docs, place.out)
    assert str(raised.value).count("sea.txt") == 1
    one = place.docs / "tea.md"
    with pytest.raises(DataError, match=r"^\S+tea.md contains no text; remove it$"):
        check_build(one, place.out)
    assert not place.out.exists()
