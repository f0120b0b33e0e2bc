"""BM25 equal to `rank-bm25`, at any division into segments."""

import numpy as np
import pytest
from rank_bm25 import BM25Okapi

from easyllm.retrieval.bm25 import Postings, bm25
from easyllm.retrieval.terms import terms

TEXTS = [
    "the tea house sells green tea",
    "a house by the sea",
    "green fields and the green sea",
    "tea",
    "北京烤鸭很好吃",
    "上海的茶馆卖绿茶",
]
QUERIES = ["green tea tea", "the sea", "烤鸭", "绿茶 house", "absent"]


def split(texts, sizes):
    parts, at = [], 0
    for size in sizes:
        parts.append(Postings.build([terms(t) for t in texts[at : at + size]]))
        at += size
    return parts


@pytest.mark.parametrize("sizes", [(6,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("query", QUERIES)
def test_scores_equal_those_of_rank_bm25(query, sizes):
    """With its idf replaced by Lucene's, which is ours; its factor k1 + 1 changes no ranking."""
    corpus = [terms(t) for t in TEXTS]
    peer = BM25Okapi(corpus)
    for word in peer.idf:
        frequency = sum(word in each for each in corpus)
        peer.idf[word] = np.log(1 + (len(corpus) - frequency + 0.5) / (frequency + 0.5))
    segments = split(TEXTS, sizes)
    found = np.concatenate(bm25(segments, [np.ones(n, bool) for n in sizes], terms(query)))
    np.testing.assert_allclose(found, peer.get_scores(terms(query)) / 2.5, rtol=1e-6)


def test_texts_that_are_not_live_count_nowhere():
    alive = np.array([True, False, True, True, False, True])
    kept = [t for t, keep in zip(TEXTS, alive, strict=True) if keep]
    wanted = bm25(split(kept, (4,)), [np.ones(4, bool)], terms("green tea 绿茶"))[0]
    found = bm25(split(TEXTS, (6,)), [alive], terms("green tea 绿茶"))[0]
    np.testing.assert_allclose(found[alive], wanted, rtol=1e-6)
    assert not found[~alive].any()


def test_an_index_without_texts_has_no_scores():
    assert bm25([], [], ["a"]) == []
    assert bm25(split(["!"], (1,)), [np.ones(1, bool)], ["a"])[0].tolist() == [0]


def test_postings_are_the_same_from_disk(tmp_path):
    made = split(TEXTS, (6,))[0]
    made.save(tmp_path)
    read = Postings.load(tmp_path)
    for name in ("hashes", "starts", "rows", "counts", "lengths"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
