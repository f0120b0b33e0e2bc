"""Near-duplicate detection: MinHash LSH over shingle sets, verified by exact Jaccard similarity.

Documents are processed in order. A document is removed if some document *kept before it* shares a
band with it and their exact Jaccard similarity is >= threshold; otherwise it is kept. Therefore

- a removed document is always a near-duplicate of a kept one (its representative), never only of
  one that was itself removed. In a chain a ~ b ~ c whose ends are not similar, which union-find
  over pairs would merge into one cluster, only b is removed;
- of every candidate pair at or above the threshold, at least one document is removed: if both were
  kept, the later would have been compared with the earlier. So the recall over pairs is at least
  `collision_probability`.

Similarities are computed on sets of 64-bit shingle hashes; two shingles collide with probability
2^-64.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from easyllm.core.atomic import atomic_directory
from easyllm.core.errors import DataError
from easyllm.corpus.dedup.clusters import Clusters
from easyllm.corpus.dedup.config import MinHashConfig
from easyllm.corpus.dedup.ragged import U64, Ragged, starts
from easyllm.corpus.dedup.words import Windows, WordHasher, mix

_BATCH_TEXTS = 1000  # a batch of short texts fits in the L2 cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Signatures:
    """MinHash signatures and shingles of one split.

    Attributes:
        band_keys: [n, bands] uint64; documents with an equal key in the same band are candidates.
        shingles: the distinct shingle hashes of each document, ascending.
    """

    band_keys: U64
    shingles: Ragged

    def __len__(self) -> int:
        return len(self.band_keys)

    def save(self, folder: Path) -> None:
        """Writes three `.npy` files into a new folder, atomically."""
        with atomic_directory(folder) as work:
            np.save(work / "band_keys.npy", self.band_keys)
            np.save(work / "shingles.npy", self.shingles.values)
            np.save(work / "offsets.npy", self.shingles.offsets)

    @classmethod
    def load(cls, folder: Path) -> "Signatures":
        """Loads what `save` wrote; the shingles are memory-mapped.

        Raises:
            DataError: the files are missing or damaged.
        """
        try:
            return cls(
                band_keys=np.load(folder / "band_keys.npy", allow_pickle=False),
                shingles=Ragged(
                    np.load(folder / "shingles.npy", mmap_mode="r", allow_pickle=False),
                    np.load(folder / "offsets.npy", allow_pickle=False),
                ),
            )
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{folder} contains no readable signatures ({error}); remove it and build again"
            ) from error


def signatures(texts: Iterable[str], config: MinHashConfig) -> Signatures:
    """Returns the signatures of a split; equal texts have equal signatures in every process.

    A text with fewer words than a shingle has one shingle. A text without words has none and is
    never a near-duplicate.
    """
    hasher, remaining = WordHasher(), iter(texts)
    keys, shingles = [np.empty((0, config.bands), np.uint64)], []
    while batch := list(islice(remaining, _BATCH_TEXTS)):
        sets = _shingle_sets(batch, config, hasher)
        shingles.append(sets)
        keys.append(_band_keys(sets, config))
    return Signatures(band_keys=np.concatenate(keys), shingles=Ragged.concatenate(shingles))


def jaccard(first: str, second: str, config: MinHashConfig) -> float:
    """Returns the Jaccard similarity |A ∩ B| / |A ∪ B| of two texts' shingle sets; 0 if empty."""
    sets = _shingle_sets([first, second], config, WordHasher())
    shared = len(np.intersect1d(sets.row(0), sets.row(1), assume_unique=True))
    return shared / max(len(sets.values) - shared, 1)


def near_duplicates(
    splits: Sequence[Signatures],
    config: MinHashConfig,
    among: NDArray[np.bool_] | None = None,
) -> Clusters:
    """Returns the clusters of all documents, indexed consecutively over the splits in order.

    Needs about 16 bytes of memory for each band that a document shares with another, plus the
    shingles that are compared.

    Args:
        splits: the signatures of each split, computed with the same configuration.
        config: the configuration.
        among: [n] bool, which documents to compare, all if None; the others (exact duplicates) are
            their own representatives.
    """
    rows = _Rows(splits)
    clusters = Clusters.alone(len(rows))
    kept_in: dict[int, list[int]] = {}  # bucket -> kept documents
    for document, buckets in _shared_buckets(splits, among):
        earlier = sorted(set().union(*(kept_in.get(bucket, ()) for bucket in buckets)))
        nearest, similarity = rows.nearest(document, earlier, config.threshold)
        if nearest is not None:
            clusters.representatives[document] = nearest
            clusters.jaccard[document] = similarity
            continue
        for bucket in buckets:
            members = kept_in.setdefault(bucket, [])
            if len(members) < config.max_bucket:
                members.append(document)
    return clusters


class _Rows:
    """The shingle sets of all splits, indexed by document over all splits."""

    def __init__(self, splits: Sequence[Signatures]) -> None:
        self._splits = splits
        self._starts = starts([len(split) for split in splits])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, document: int) -> U64:
        split = int(np.searchsorted(self._starts, document, side="right")) - 1
        return self._splits[split].shingles.row(document - int(self._starts[split]))

    def nearest(
        self, document: int, others: list[int], threshold: float
    ) -> tuple[int | None, float]:
        """Returns the most similar of `others` and the similarity, or (None, 0.0).

        Only similarities at or above the threshold count; ties go to the first.
        """
        own = self[document]
        # |A ∩ B| / |A ∪ B| <= min(|A|, |B|) / max(|A|, |B|): most sets that cannot reach the
        # threshold are skipped without reading them
        sets = [(other, row) for other in others if _sizes_fit(own, row := self[other], threshold)]
        if not sets:
            return None, 0.0
        ragged = Ragged.from_rows([row for _, row in sets])
        place = np.minimum(np.searchsorted(own, ragged.values), len(own) - 1)
        shared = np.add.reduceat(
            (own[place] == ragged.values).astype(np.int64), ragged.offsets[:-1]
        )
        similarity = shared / (len(own) + ragged.lengths - shared)
        best = int(similarity.argmax())
        if similarity[best] < threshold:
            return None, 0.0
        return sets[best][0], float(similarity[best])


def _sizes_fit(first: U64, second: U64, threshold: float) -> bool:
    small, large = sorted((len(first), len(second)))
    return small / large >= threshold


def _shared_buckets(
    splits: Sequence[Signatures], among: NDArray[np.bool_] | None
) -> Iterator[tuple[int, list[int]]]:
    """Yields (document, buckets it shares with others), in order, if there are such buckets."""
    sizes = np.concatenate([np.empty(0, np.int64), *(split.shingles.lengths for split in splits)])
    filled = np.flatnonzero(sizes if among is None else sizes * among)
    if not len(filled):
        return
    documents, buckets, num_buckets = [], [], 0
    for band in range(splits[0].band_keys.shape[1]):
        keys = np.concatenate([split.band_keys[:, band] for split in splits])[filled]
        order = np.argsort(keys, kind="stable")
        is_same = keys[order[1:]] == keys[order[:-1]]
        is_shared = np.append(is_same, False) | np.insert(is_same, 0, False)
        bucket = num_buckets + np.cumsum(np.insert(~is_same, 0, False))
        num_buckets = int(bucket[-1]) + 1
        documents.append(filled[order[is_shared]])
        buckets.append(bucket[is_shared])
    document, bucket = np.concatenate(documents), np.concatenate(buckets)
    order = np.argsort(document, kind="stable")
    document, bucket = document[order], bucket[order]
    firsts = np.flatnonzero(np.diff(document, prepend=-1))
    for first, end in pairwise([*firsts, len(document)]):
        yield int(document[first]), bucket[first:end].tolist()


def _shingle_sets(texts: Sequence[str], config: MinHashConfig, hasher: WordHasher) -> Ragged:
    """Returns the distinct shingle hashes of each text, ascending."""
    size = config.shingle_size
    tokens = Ragged.from_rows([_padded(hasher.hashes(text, config.unit), size) for text in texts])
    row = np.repeat(np.arange(len(tokens)), tokens.lengths)
    windows = mix(Windows(tokens.values).hashes(size))
    begins = np.arange(len(windows))
    inside = begins + size <= tokens.offsets[row[: len(windows)] + 1]  # within one text
    row, windows = row[: len(windows)][inside], windows[inside]
    order = np.lexsort((windows, row))
    row, windows = row[order], windows[order]
    is_new = np.ones(len(row), bool)
    is_new[1:] = (row[1:] != row[:-1]) | (windows[1:] != windows[:-1])
    return Ragged(windows[is_new], starts(np.bincount(row[is_new], minlength=len(texts))))


def _padded(tokens: U64, size: int) -> U64:
    missing = size - len(tokens)
    if missing <= 0 or not len(tokens):
        return tokens
    return np.concatenate([tokens, np.zeros(missing, np.uint64)])


def _band_keys(shingles: Ragged, config: MinHashConfig) -> U64:
    """Returns [n, bands] uint64, a hash of each band's minima; 0 for a text without shingles.

    Each of the bands·rows hash functions is h(x) = a·x + b modulo 2^32 with odd a, applied to the
    upper 32 bits of the shingle hash.
    """
    keys = np.zeros((len(shingles), config.bands), np.uint64)
    filled = np.flatnonzero(shingles.lengths)
    if not len(filled):
        return keys
    begins = shingles.offsets[filled]
    values = (shingles.values >> np.uint64(32)).astype(np.uint32)
    coefficients = _coefficients(config)
    for band in range(config.bands):
        key = np.full(len(filled), band + 1, np.uint64)
        for a, b in coefficients[band]:
            minima = np.minimum.reduceat(values * a + b, begins)
            key = mix(key ^ minima.astype(np.uint64))
        keys[filled, band] = key
    return keys


def _coefficients(config: MinHashConfig) -> NDArray[np.uint32]:
    """Returns [bands, rows, 2] uint32, the coefficients (a, b) of each hash function.

    They depend on the seed only, not on numpy's generators, which may change between versions.
    """
    count = config.bands * config.rows * 2
    steps = np.arange(1, count + 1, dtype=np.uint64)
    raw = mix(mix(steps) + mix(np.array([config.seed], np.uint64)))
    numbers = (raw >> np.uint64(32)).astype(np.uint32).reshape(config.bands, config.rows, 2)
    numbers[..., 0] |= np.uint32(1)
    return numbers
