"""Steps divided among ranks: everything once, balanced by tokens, equally many micro-batches."""

from collections import Counter

import pytest

from easyllm.batches.loader import Loader
from easyllm.batches.rank_share import RankShare, balanced
from easyllm.examples.sample import Sample


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("sizes", [[9, 1, 1, 1], [5], [7, 7, 7, 2, 2], [30, 1, 1]])
def test_each_sequence_is_in_one_real_micro_batch(sizes, ranks):
    shares = [RankShare(rank, ranks).groups(sizes, 10) for rank in range(ranks)]
    assert len({len(groups) for groups, _ in shares}) == 1
    real = [n for groups, fillers in shares for g in groups[: len(groups) - fillers] for n in g]
    assert Counter(real) == Counter(range(len(sizes)))
    for groups, _ in shares:
        assert all(groups)
        assert all(len(g) == 1 or sum(sizes[n] for n in g) <= 10 for g in groups)


def test_ranks_get_nearly_equal_numbers_of_tokens():
    sizes = [512, 16, 300, 80, 200, 120, 64, 64]
    sums = [sum(sizes[n] for n in part) for part in balanced(sizes, 2)]
    assert max(sums) - min(sums) <= 64


def test_the_order_of_the_data_does_not_depend_on_the_ranks():
    samples = [Sample.from_mask(tuple(range(3, 5 + n))) for n in range(7)]

    def loader(share=None):
        found = Loader(samples, batch_size=3, micro_batch_tokens=12, seed=1)
        found.share = share
        return found

    one, ranks = loader(), [loader(RankShare(rank, 2)) for rank in range(2)]
    for _ in range(4):
        expected = Counter(n for batch in one.next_step() for n in batch.lengths)
        steps = [each.next_step() for each in ranks]
        real = [b for step in steps for b in step if not b.is_filler]
        assert Counter(n for batch in real for n in batch.lengths) == expected
        assert all(each.state == one.state and each.last == one.last for each in ranks)


def test_a_rank_without_sequences_gets_a_filler():
    samples = [Sample.from_mask((3, 4, 5))]
    loader = Loader(samples, batch_size=1, micro_batch_tokens=12, seed=None)
    loader.share = RankShare(1, 2)
    (batch,) = loader.next_step()
    assert batch.is_filler
    assert batch.padded_to_multiple(4).is_filler
