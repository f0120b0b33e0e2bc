"""Samples, the packed layout, and the loader's order and resumption."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from easyllm.batches.loader import Loader, LoaderState
from easyllm.batches.packing import pack, split_by_tokens
from easyllm.core.errors import ConfigError
from easyllm.examples.sample import Sample
from easyllm.ops.cross_entropy import IGNORE_INDEX

IDS = st.lists(st.integers(0, 999), min_size=2, max_size=12)
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=20)


def samples_of(lengths):
    """Returns samples of the given lengths whose ids are all different."""
    samples, first = [], 0
    for length in lengths:
        samples.append(Sample.from_mask(list(range(first, first + length + 1))))
        first += length + 1
    return samples


def epoch_of(loader):
    """Returns one epoch's samples, by their first ids, and the sizes of its micro-batches."""
    first, sizes = [], []
    epoch = loader.state.epoch
    while loader.state.epoch == epoch:
        for batch in loader.next_step():
            first += batch.token_ids[batch.cu_seqlens[:-1].long()].tolist()
            sizes.append(len(batch.token_ids))
    return first, sizes


def flat(step):
    return [batch.token_ids.tolist() for batch in step]


@settings(deadline=None, max_examples=50)
@given(ids=IDS)
def test_labels_are_the_next_tokens(ids):
    sample = Sample.from_mask(ids)
    assert list(sample.token_ids) == ids[:-1]
    assert list(sample.labels) == ids[1:]
    assert sample.num_trained == len(ids) - 1


@settings(deadline=None, max_examples=50)
@given(pairs=st.lists(st.tuples(st.integers(0, 999), st.booleans()), min_size=2, max_size=12))
def test_labels_of_masked_tokens_are_ignored(pairs):
    ids, mask = [p[0] for p in pairs], [p[1] for p in pairs]
    sample = Sample.from_mask(ids, mask)
    assert len(sample.labels) == len(sample.token_ids) == len(ids) - 1
    for position, label in enumerate(sample.labels):
        assert label == (ids[position + 1] if mask[position + 1] else IGNORE_INDEX)
    assert sample.num_trained == sum(mask[1:])


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError):
        Sample.from_mask([1, 2, 3], [True, True])


def test_a_single_token_has_no_label():
    assert Sample.from_mask([7]) == Sample((), ())


def test_packing_concatenates_samples():
    samples = [
        Sample.from_mask([10, 11, 12, 13], [False, False, True, True]),
        Sample.from_mask([20, 21]),
        Sample.from_mask([30, 31, 32], [True, True, False]),
    ]
    batch = pack(samples)
    assert batch.token_ids.tolist() == [10, 11, 12, 20, 30, 31]
    assert batch.labels.tolist() == [IGNORE_INDEX, 12, 13, 21, 31, IGNORE_INDEX]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.lengths == (3, 1, 2)
    assert batch.num_trained == 4


@settings(deadline=None, max_examples=50)
@given(lengths=LENGTHS)
def test_a_packed_batch_contains_exactly_its_samples(lengths):
    samples = samples_of(lengths)
    batch = pack(samples)
    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(batch.token_ids) == sum(lengths)
    for sample, (start, end) in zip(samples, pairwise(bounds), strict=True):
        assert tuple(batch.token_ids[start:end].tolist()) == sample.token_ids
        assert tuple(batch.labels[start:end].tolist()) == sample.labels
        assert batch.positions[start:end].tolist() == list(range(end - start))
    assert batch.num_trained == int((batch.labels != IGNORE_INDEX).sum())
    assert batch.cu_seqlens.dtype == torch.int32
    assert {t.dtype for t in (batch.token_ids, batch.labels, batch.positions)} == {torch.int64}


def test_moving_a_batch_to_its_own_device_returns_itself():
    batch = pack(samples_of([2, 3]))
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    assert moved.token_ids.device.type == "meta"
    assert (moved.lengths, moved.num_trained) == (batch.lengths, batch.num_trained)
    assert batch.context().lengths == batch.lengths


@settings(deadline=None, max_examples=100)
@given(lengths=LENGTHS, most=st.integers(1, 20))
def test_groups_keep_the_order_and_the_limit_and_are_filled_greedily(lengths, most):
    samples = samples_of(lengths)
    groups = split_by_tokens(samples, most)
    assert [s for group in groups for s in group] == samples
    sizes = [sum(len(s.token_ids) for s in group) for group in groups]
    for group, size in zip(groups, sizes, strict=True):
        assert group
        assert size <= most or len(group) == 1
    for size, after in zip(sizes, groups[1:], strict=False):
        assert size + len(after[0].token_ids) > most


def test_no_samples_give_no_groups():
    assert split_by_tokens([], 10) == []


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("batch_size", [1, 4, 10, 32])
def test_every_sample_occurs_once_per_epoch(seed, batch_size):
    samples = samples_of([1, 5, 2, 8, 3, 3, 1, 9, 4, 2])
    loader = Loader(samples, batch_size=batch_size, micro_batch_tokens=8, seed=seed)
    for epoch in range(3):
        assert loader.state == LoaderState(epoch, 0)
        steps = [loader.next_step() for _ in range(loader.steps_per_epoch)]
        seen = [tuple(ids) for step in steps for ids in sequences(step)]
        assert sorted(seen) == sorted(s.token_ids for s in samples)


def sequences(step):
    for batch in step:
        bounds = batch.cu_seqlens.tolist()
        for start, end in pairwise(bounds):
            yield batch.token_ids[start:end].tolist()


def test_micro_batches_respect_the_token_limit():
    samples = samples_of([1, 5, 2, 12, 3, 3, 1, 9, 4, 2])
    loader = Loader(samples, batch_size=5, micro_batch_tokens=9, seed=3)
    _, sizes = epoch_of(loader)
    assert [size for size in sizes if size > 9] == [12]


def test_a_step_has_batch_size_sequences_and_the_last_step_of_an_epoch_the_rest():
    loader = Loader(samples_of([2] * 10), batch_size=4, micro_batch_tokens=5, seed=0)
    counts = [sum(len(b.lengths) for b in loader.next_step()) for _ in range(6)]
    assert counts == [4, 4, 2] * 2
    assert loader.steps_per_epoch == 3


def test_the_order_differs_by_epoch_and_by_seed_and_is_the_same_for_the_same_seed():
    samples = samples_of([3] * 50)

    def epochs(seed):
        loader = Loader(samples, batch_size=8, micro_batch_tokens=64, seed=seed)
        return [epoch_of(loader)[0] for _ in range(3)]

    first, second, third = epochs(5)
    assert first != second != third != first
    assert epochs(5) == [first, second, third]
    assert epochs(6) != [first, second, third]
    assert epochs(6)[0] not in (first, second, third)


def test_without_a_seed_the_order_is_that_of_the_data():
    samples = samples_of([3] * 10)
    loader = Loader(samples, batch_size=4, micro_batch_tokens=64, seed=None)
    for _ in range(2):
        assert epoch_of(loader)[0] == [s.token_ids[0] for s in samples]


@pytest.mark.parametrize("done", [0, 1, 3, 4, 7, 11])
def test_setting_the_state_resumes_exactly(done):
    samples = samples_of([1, 5, 2, 8, 3, 3, 1, 9, 4, 2, 6])
    options = {"batch_size": 3, "micro_batch_tokens": 8, "seed": 11}
    running = Loader(samples, **options)
    for _ in range(done):
        running.next_step()
    saved = running.state.as_dict()
    resumed = Loader(samples, **options)
    resumed.next_step()
    resumed.state = LoaderState(**saved)
    for _ in range(9):
        assert flat(resumed.next_step()) == flat(running.next_step())
    assert resumed.state == running.state


def test_iterating_yields_steps_forever():
    samples = samples_of([2, 3, 4])
    by_step = Loader(samples, batch_size=2, micro_batch_tokens=8, seed=1)
    by_loop = Loader(samples, batch_size=2, micro_batch_tokens=8, seed=1)
    for _, step in zip(range(7), by_loop, strict=False):
        assert flat(step) == flat(by_step.next_step())


def test_a_loader_without_samples_is_refused():
    with pytest.raises(ConfigError, match="no samples"):
        Loader([], batch_size=1, micro_batch_tokens=8, seed=0)


@settings(deadline=None, max_examples=50)
@given(lengths=LENGTHS, multiple=st.integers(1, 40))
def test_a_padded_batch_has_one_more_sequence_without_labels(lengths, multiple):
    batch = pack(samples_of(lengths))
    padded_to_multiple = batch.padded_to_multiple(multiple)
    count, missing = sum(lengths), -sum(lengths) % multiple
    assert len(padded_to_multiple.token_ids) == len(padded_to_multiple.labels) == count + missing
    assert padded_to_multiple.token_ids[:count].equal(batch.token_ids)
    assert padded_to_multiple.labels[:count].equal(batch.labels)
    assert (padded_to_multiple.labels[count:] == IGNORE_INDEX).all()
    assert padded_to_multiple.positions.tolist() == [*batch.positions.tolist(), *range(missing)]
    assert padded_to_multiple.lengths == (*batch.lengths, *([missing] if missing else []))
    assert padded_to_multiple.cu_seqlens.tolist() == [
        0,
        *torch.tensor(padded_to_multiple.lengths).cumsum(0).tolist(),
    ]
    assert padded_to_multiple.num_trained == batch.num_trained
