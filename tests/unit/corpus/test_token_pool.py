"""Documents of a source across splits: held-out parts, random or tail, are disjoint."""

import numpy as np
import pytest

from easyllm.corpus.shards import token_dtype
from easyllm.corpus.token_pool import TokenPool

TEXTS = (("hello world", "good morning"), (), ("the lazy dog", "a language model", "0123456789"))


@pytest.fixture
def splits(tmp_path, tiny_tokenizer):
    """Three tokenized splits, the second without documents."""
    stems = []
    for number, texts in enumerate(TEXTS):
        ids = [tiny_tokenizer.encode(text) for text in texts]
        stem = tmp_path / f"{number:05d}"
        flat = [token for document in ids for token in document]
        np.array(flat, dtype=token_dtype(tiny_tokenizer.vocab_size)).tofile(f"{stem}.bin")
        np.savez(
            f"{stem}.npz",
            lengths=np.array([len(document) for document in ids], dtype=np.int64),
            bytes=np.array([len(text.encode()) for text in texts], dtype=np.int64),
        )
        stems.append(stem)
    return stems


def ids_of(pool, numbers):
    return [token for number in numbers for token in pool.document(int(number)).tolist()]


def test_documents_of_all_splits_are_numbered_in_order(splits, tiny_tokenizer):
    pool = TokenPool(splits, tiny_tokenizer)
    texts = [text for texts in TEXTS for text in texts]
    assert [tiny_tokenizer.decode(pool.document(n).tolist()) for n in range(5)] == texts
    assert pool.bytes.tolist() == [len(text) for text in texts]


@pytest.mark.parametrize(("share", "held"), [(0.0, 0), (0.01, 1), (0.4, 2), (0.99, 4)])
def test_a_share_at_random_is_at_least_one_document_and_never_all(
    splits, tiny_tokenizer, share, held
):
    pool = TokenPool(splits, tiny_tokenizer)
    numbers = pool.hold_out(share, np.random.default_rng(0))
    assert len(numbers) == held
    assert sorted([*numbers, *pool.numbers]) == list(range(5))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.77])
def test_the_tail_is_the_last_tokens_to_the_token(splits, tiny_tokenizer, share):
    pool = TokenPool(splits, tiny_tokenizer)
    whole, size = ids_of(pool, pool.numbers), int(pool.bytes.sum())
    held = pool.hold_out_tail(share)
    kept = ids_of(pool, pool.numbers)
    assert len(kept) == int(len(whole) * (1 - share))
    assert kept + ids_of(pool, held) == whole
    assert int(pool.bytes.sum()) == size
    for number in range(len(pool.lengths)):
        text = tiny_tokenizer.decode(pool.document(number).tolist())
        assert (len(pool.document(number)), len(text)) == (pool.lengths[number], pool.bytes[number])
