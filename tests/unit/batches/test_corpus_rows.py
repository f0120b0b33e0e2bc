"""Rows of token shards: every token once, isolated documents, and a position of two integers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from easyllm.batches.corpus_rows import Rows, ShardLoader, validation_batches
from easyllm.batches.loader import LoaderState
from easyllm.core.errors import ConfigError, DataError
from easyllm.corpus.shards import TokenShards, write_shards
from easyllm.corpus.token_bytes import token_bytes
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.tokenizer.train import train_tokenizer
from easyllm.tokenizer.train_config import (
    BPEConfig,
    CharactersConfig,
    TokenizerConfig,
    UnigramConfig,
)
from tiny_models import build_tiny

LENGTHS = (5, 1, 40, 2, 17, 0, 9, 30, 3, 1, 1, 26)


def documents_of(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 320, n).tolist() for n in lengths]


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tiny_tokenizer):
    """Twelve documents in several shards."""
    folder = tmp_path_factory.mktemp("shards") / "s"
    write_shards(folder, documents_of(LENGTHS), tiny_tokenizer, shard_tokens=50)
    opened = TokenShards(folder, tokenizer=tiny_tokenizer)
    assert len(opened.manifest.shards) > 2
    return opened


def loader_of(shards, **changes):
    values = {"row_tokens": 16, "batch_size": 3, "micro_batch_tokens": 32, "seed": 7}
    return ShardLoader(shards, **values | changes)


def epoch_of(loader):
    """Returns the batches of one epoch."""
    return [batch for _ in range(loader.steps_per_epoch) for batch in loader.next_step()]


def expected_row(documents, start, stop):
    """Builds a row by its definition, one token at a time."""
    laid = [
        (token, document[i + 1] if i + 1 < len(document) else -100, number)
        for number, document in enumerate(documents)
        for i, token in enumerate(document)
    ][start:stop]
    owners = [number for _, _, number in laid]
    lengths = [owners.count(number) for number in dict.fromkeys(owners)]
    return [t for t, _, _ in laid], [label for _, label, _ in laid], lengths


def test_a_row_matches_its_definition(shards):
    documents, rows = documents_of(LENGTHS), Rows(shards, 16)
    assert len(rows) == -(-sum(LENGTHS) // 16)
    for number in range(len(rows)):
        row = rows.row(number)
        ids, labels, lengths = expected_row(documents, 16 * number, 16 * (number + 1))
        assert row.token_ids.tolist() == ids
        assert row.labels.tolist() == labels
        assert row.lengths.tolist() == lengths


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any),
    row_tokens=st.integers(1, 30),
    shard_tokens=st.integers(1, 60),
    order_seed=st.integers(0, 100),
)
def test_rows_of_any_documents_in_any_order_match_their_definition(
    tmp_path_factory, tiny_tokenizer, lengths, row_tokens, shard_tokens, order_seed
):
    folder = tmp_path_factory.mktemp("any") / "s"
    documents = documents_of(lengths)
    write_shards(folder, documents, tiny_tokenizer, shard_tokens=shard_tokens)
    order = np.random.default_rng(order_seed).permutation(len(lengths))
    rows = Rows(TokenShards(folder), row_tokens, order=order)
    laid = [documents[i] for i in order]
    for number in range(len(rows)):
        row = rows.row(number)
        got = (row.token_ids.tolist(), row.labels.tolist(), row.lengths.tolist())
        assert got == expected_row(laid, row_tokens * number, row_tokens * (number + 1))


def test_an_epoch_contains_every_token_once_with_its_successor(shards):
    loader = loader_of(shards)
    for _ in range(3):
        seen = []
        for batch in epoch_of(loader):
            seen += zip(batch.token_ids.tolist(), batch.labels.tolist(), strict=True)
        laid = expected_row(documents_of(LENGTHS), 0, None)
        assert sorted(seen) == sorted(zip(laid[0], laid[1], strict=True))
    assert loader.state == LoaderState(3, 0)


def test_a_batch_is_packed(shards):
    for batch in epoch_of(loader_of(shards, micro_batch_tokens=48)):
        assert sum(batch.lengths) == len(batch.token_ids) <= 48
        assert batch.cu_seqlens.tolist() == np.cumsum([0, *batch.lengths]).tolist()
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.token_ids.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64
        assert batch.positions.tolist() == [i for n in batch.lengths for i in range(n)]
        assert batch.num_trained == int((batch.labels != -100).sum())


def test_documents_in_a_row_equal_each_alone(shards):
    model = build_tiny(seed=3)
    for batch in epoch_of(loader_of(shards)):
        packed = model.head(model(batch.token_ids, batch.context()))
        alone = torch.cat([model.logits(part) for part in batch.token_ids.split(batch.lengths)])
        torch.testing.assert_close(packed, alone, atol=2e-5, rtol=0)


def test_a_step_has_the_requested_rows_in_micro_batches_of_complete_rows(shards):
    loader = loader_of(shards, batch_size=4, micro_batch_tokens=40, seed=None)
    step = loader.next_step()
    assert [len(batch.token_ids) for batch in step] == [32, 32]
    assert len(loader.last) == 4
    by_tokens = loader_of(shards, batch_size=None, batch_tokens=50)
    assert by_tokens.rows_per_step == 4
    alone = loader_of(shards, micro_batch_tokens=5, seed=None).next_step()
    assert [len(batch.token_ids) for batch in alone] == [16, 16, 16]


def test_the_last_shorter_row_is_kept(shards):
    loader = loader_of(shards, seed=None)
    epoch = epoch_of(loader)
    assert sum(len(batch.token_ids) for batch in epoch) == sum(LENGTHS)
    assert len(epoch[-1].token_ids) == sum(LENGTHS) % 16


def test_without_a_seed_the_order_is_that_of_the_shards(shards):
    ids = torch.cat([batch.token_ids for batch in epoch_of(loader_of(shards, seed=None))])
    assert ids.tolist() == [token for document in documents_of(LENGTHS) for token in document]


def test_epochs_differ_and_the_same_seed_repeats_them(shards):
    loader, again, other = loader_of(shards), loader_of(shards), loader_of(shards, seed=8)
    first, second = epoch_of(loader), epoch_of(loader)
    assert not same(first, second)
    assert same(first, epoch_of(again))
    assert same(second, epoch_of(again))
    assert not same(first, epoch_of(other))


def test_rows_are_shuffled_too(shards):
    loader = loader_of(shards)
    loader.next_step()
    assert loader.last != sorted(loader.last) or loader.last != [0, 1, 2]
    assert sorted(loader.last) != [0, 1, 2]


def test_resuming_at_any_position_gives_the_same_batches(shards):
    whole, positions = loader_of(shards), []
    steps = []
    for _ in range(2 * whole.steps_per_epoch + 1):
        positions.append(whole.state.as_dict())
        steps.append(whole.next_step())
    for number, position in enumerate(positions):
        resumed = loader_of(shards)
        resumed.state = LoaderState(**position)
        assert same(resumed.next_step(), steps[number])
        if number + 1 < len(steps):
            assert same(resumed.next_step(), steps[number + 1])


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a.token_ids, b.token_ids) and torch.equal(a.labels, b.labels)
        for a, b in zip(one, other, strict=True)
    )


def test_invalid_options_are_named(shards, tmp_path, tiny_tokenizer):
    for sizes in ({"batch_size": None}, {"batch_size": 2, "batch_tokens": 100}):
        with pytest.raises(ConfigError, match="give one of them"):
            loader_of(shards, **sizes)
    write_shards(tmp_path / "empty", [], tiny_tokenizer)
    with pytest.raises(DataError, match="contain no tokens"):
        loader_of(TokenShards(tmp_path / "empty"))
    write_shards(tmp_path / "blank", [[], []], tiny_tokenizer)
    with pytest.raises(DataError, match="contain no tokens"):
        loader_of(TokenShards(tmp_path / "blank"))


# ---- bytes

TEXTS = ["Sphinx of black quartz, judge my vow.\n", "héhé 你好，世界 😀 ok", "x", "  two  spaces\t"]


def trained(**changes) -> Tokenizer:
    return train_tokenizer(TEXTS * 3, TokenizerConfig(**changes))


TOKENIZERS = {
    "byte-level": lambda: trained(vocab_size=300, chat_template="chatml"),
    "byte-level, split characters": lambda: trained(vocab_size=258, model=BPEConfig()),
    "characters": lambda: trained(model=CharactersConfig()),
    "unigram with byte pieces": lambda: trained(vocab_size=320, model=UnigramConfig()),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_bytes_of_tokens_sum_to_those_of_a_text(name):
    tokenizer = TOKENIZERS[name]()
    sizes = token_bytes(tokenizer)
    assert len(sizes) == tokenizer.vocab_size
    for text in [*TEXTS, "A new one: ñ"]:
        if name == "characters" and not set(text) <= set("".join(TEXTS)):
            continue
        ids = tokenizer.encode(text, special_tokens=False)
        assert sizes[ids].sum() == len(text.encode())
    assert all(sizes[i] == 0 for i in tokenizer.special_ids)


def test_the_bytes_of_smollm2_tokens_sum_to_those_of_a_text(smollm2_tokenizer):
    sizes = token_bytes(smollm2_tokenizer)
    for text in TEXTS:
        assert sizes[smollm2_tokenizer.encode(text)].sum() == len(text.encode())


def test_validation_uses_the_first_tokens_and_counts_the_bytes_of_its_labels(tmp_path):
    tokenizer = trained(vocab_size=270)
    end = tokenizer.eos_id
    documents = [[*tokenizer.encode(text), end] for text in TEXTS]
    write_shards(tmp_path / "v", documents, tokenizer, end_id=end)
    shards = TokenShards(tmp_path / "v", tokenizer=tokenizer)
    sizes = {"row_tokens": 8, "micro_batch_tokens": 16}
    whole = validation_batches(shards, tokenizer, max_tokens=10**6, **sizes)
    firsts = sum(len(tokenizer.token_text(document[0]).encode()) for document in documents)
    assert whole.num_bytes == sum(len(text.encode()) for text in TEXTS) - firsts
    assert sum(len(batch.token_ids) for batch in whole.batches) == sum(map(len, documents))
    cut = validation_batches(shards, tokenizer, max_tokens=21, **sizes)
    assert [len(batch.token_ids) for batch in cut.batches] == [16, 5]
    laid = [token for document in documents for token in document]
    assert torch.cat([batch.token_ids for batch in cut.batches]).tolist() == laid[:21]
    assert int(cut.batches[-1].labels[-1]) == laid[21]
    assert cut.num_bytes < whole.num_bytes
