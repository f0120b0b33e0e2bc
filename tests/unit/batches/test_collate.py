"""Padded batches: layout, positions, and conversion to the packed layout and back."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from easyllm.batches.collate import (
    last_rows,
    left_pad,
    next_logits,
    positions_of,
    repad,
    right_pad,
    score_padded,
    unpad,
)
from easyllm.core.errors import DataError

SEQUENCES = st.lists(st.lists(st.integers(0, 319), min_size=1, max_size=9), min_size=1, max_size=6)
PADS = {"left": left_pad, "right": right_pad}
either_side = pytest.mark.parametrize("pad", PADS.values(), ids=PADS.keys())


def test_left_padding_precedes_the_tokens_and_positions_skip_it():
    batch = left_pad([[5, 6, 7], [8], [1, 2, 3, 4]], pad_id=9)
    assert batch.token_ids.tolist() == [[9, 5, 6, 7], [9, 9, 9, 8], [1, 2, 3, 4]]
    assert batch.mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    assert batch.positions.tolist() == [[0, 0, 1, 2], [0, 0, 0, 0], [0, 1, 2, 3]]
    assert {t.dtype for t in (batch.token_ids, batch.mask, batch.positions)} == {torch.int64}


def test_right_padding_follows_the_tokens():
    batch = right_pad([[5, 6, 7], [8]], pad_id=9, length=4)
    assert batch.token_ids.tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert batch.mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.positions[batch.mask.bool()].tolist() == [0, 1, 2, 0]


@either_side
def test_a_pad_id_that_is_also_a_token_is_not_padding(pad):
    batch = pad([[0, 0, 1], [0]], pad_id=0)
    ids, lengths = unpad(batch.token_ids, batch.mask)
    assert (ids.tolist(), lengths) == ([0, 0, 1, 0], (3, 1))


@settings(deadline=None, max_examples=60)
@given(sequences=SEQUENCES, extra=st.integers(0, 4), side=st.sampled_from(sorted(PADS)))
def test_unpadding_returns_the_sequences_and_repadding_the_batch(sequences, extra, side):
    length = max(map(len, sequences)) + extra
    batch = PADS[side](sequences, pad_id=7, length=length)
    assert batch.token_ids.shape == (len(sequences), length)
    ids, lengths = unpad(batch.token_ids, batch.mask)
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    assert [ids[a:b].tolist() for a, b in pairwise(bounds)] == sequences
    assert torch.equal(repad(ids, batch.mask, fill=7), batch.token_ids)
    packed_positions, _ = unpad(batch.positions, batch.mask.bool())
    assert packed_positions.tolist() == [i for s in sequences for i in range(len(s))]
    assert torch.equal(positions_of(batch.mask), batch.positions)
    assert last_rows(batch.token_ids, batch.mask).tolist() == [s[-1] for s in sequences]


def test_values_of_several_dimensions_are_padded_alike():
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    values = torch.arange(2 * 3 * 4).view(2, 3, 4)
    packed, lengths = unpad(values, mask)
    assert (packed.shape, lengths) == ((4, 4), (2, 2))
    again = repad(packed, mask, fill=-1)
    assert torch.equal(again[mask.bool()], packed)
    assert (again[0, 0] == -1).all()
    assert (again[1, 2] == -1).all()
    assert torch.equal(last_rows(values, mask), torch.stack([values[0, 2], values[1, 1]]))


@either_side
@pytest.mark.parametrize("sequences", [[], [[1], []]])
def test_an_empty_batch_is_refused(pad, sequences):
    with pytest.raises(DataError, match="at least one token each"):
        pad(sequences, pad_id=0)


@either_side
def test_a_sequence_longer_than_the_limit_is_refused(pad):
    with pytest.raises(DataError, match=r"3 tokens does not fit length=2"):
        pad([[1], [1, 2, 3]], pad_id=0, length=2)


def test_a_mask_that_does_not_fit_is_refused():
    with pytest.raises(DataError, match=r"mask of shape \[2, 3\] .*values of shape \[2, 4\]"):
        unpad(torch.zeros(2, 4), torch.ones(2, 3))
    with pytest.raises(DataError, match="row 1 of the batch is padding only"):
        unpad(torch.zeros(2, 2), torch.tensor([[0, 1], [0, 0]]))


@either_side
def test_scores_of_a_padded_batch_equal_those_of_each_row_alone(tiny_model, pad):
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 320, (n,), generator=generator).tolist() for n in (5, 1, 17, 9)]
    batch = pad(rows, pad_id=0, length=20)
    scores = score_padded(tiny_model, batch.token_ids, batch.mask)
    assert scores.shape == batch.mask.shape
    assert (scores[batch.mask == 0] == 0).all()
    after = next_logits(tiny_model, batch.token_ids, batch.mask)
    for row, got, logits, kept in zip(rows, scores, after, batch.mask.bool(), strict=True):
        alone = tiny_model.logits(row)
        logprobs = alone[:-1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(row[1:])[:, None]).squeeze(1)
        torch.testing.assert_close(got[kept][1:], expected, atol=3e-5, rtol=0)
        assert got[kept][0] == 0
        torch.testing.assert_close(logits, alone[-1], atol=3e-5, rtol=0)


def test_rows_of_one_token_have_no_scores(tiny_model):
    batch = left_pad([[5], [6]], pad_id=0)
    assert score_padded(tiny_model, batch.token_ids, batch.mask).tolist() == [[0.0], [0.0]]
    assert next_logits(tiny_model, batch.token_ids, batch.mask).shape == (2, 320)


def test_long_batches_are_scored_in_chunks(tiny_model, monkeypatch):
    rows = [[*range(3, 40)], [*range(50, 60)]]
    batch = left_pad(rows, pad_id=0)
    whole = score_padded(tiny_model, batch.token_ids, batch.mask)
    monkeypatch.setattr("easyllm.ops.cross_entropy.CHUNK_BYTES", 4 * 320 * 5)
    # a GEMM with another number of rows may round differently
    chunked = score_padded(tiny_model, batch.token_ids, batch.mask)
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=0)
