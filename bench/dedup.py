"""Deduplicates one million short documents with two processes; one JSON row.

    python bench/dedup.py [--documents 1000000] [--processes 2] [--record]

The row gives seconds, peak memory, and what was found. The documents (40 to 80 words of a Zipf
vocabulary of 50,000) are written to files before the timing starts: 5% are copies of an earlier
one, 15% are copies with 1 to 6 words changed, 5% share half of their words with an earlier one, and
the rest are new. The time covers reading the files up to the written cluster map, with the default
configuration: exact deduplication, then MinHash. Recall is over planted pairs whose Jaccard
similarity, computed here from sets of word triples, is at least 0.8.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import machine
import numpy as np

from easyllm.corpus.dedup.config import ExactConfig, MinHashConfig
from easyllm.corpus.dedup.exact import exact_duplicates, exact_keys
from easyllm.corpus.dedup.minhash import Signatures, near_duplicates, signatures

SPLITS = 16
VOCABULARY = 50_000
KINDS = ("new", "copy", "edited", "half")
SHARES = (0.75, 0.05, 0.15, 0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(deduplicate(options.work, options.processes)))
        return
    with tempfile.TemporaryDirectory() as folder:
        plant(Path(folder), options.documents)
        command = [sys.executable, __file__, "--work", folder]
        command += ["--processes", str(options.processes)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = machine.row(
            "dedup",
            documents=options.documents,
            processes=options.processes,
            ours=json.loads(done.stdout),
            found=judge(Path(folder)),
        )
    machine.finish(row, "dedup", record=options.record)


def plant(folder: Path, num_documents: int) -> None:
    """Writes the documents, one JSON string per line, and their kinds and source documents."""
    rng = np.random.default_rng(0)
    names = np.array([f"{word:x}" for word in rng.permutation(VOCABULARY) + 4096])
    weights = 1 / np.arange(10, VOCABULARY + 10)
    weights = np.cumsum(weights / weights.sum())
    kinds = rng.choice(len(KINDS), num_documents, p=SHARES)
    kinds[:1000] = 0
    sources = np.zeros(num_documents, np.int64)
    recent: list[np.ndarray] = []  # the last 10,000 original documents
    numbers: list[int] = []
    for split, part in enumerate(np.array_split(np.arange(num_documents), SPLITS)):
        with (folder / f"{split:02}.jsonl").open("w") as file:
            for document in part:
                words = np.searchsorted(weights, rng.random(rng.integers(40, 81)))
                if kinds[document] == 0:
                    recent, numbers = recent[-9999:], numbers[-9999:]
                    recent.append(words)
                    numbers.append(document)
                else:
                    place = rng.integers(len(recent))
                    words = vary(recent[place], words, KINDS[kinds[document]], rng)
                    sources[document] = numbers[place]
                file.write(json.dumps(" ".join(names[words])) + "\n")
    np.save(folder / "kinds.npy", kinds)
    np.save(folder / "sources.npy", sources)


def vary(source: np.ndarray, fresh: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Returns the words of an altered copy of `source`."""
    if kind == "half":
        return np.concatenate([source[: len(source) // 2], fresh[len(source) // 2 :]])
    words = source.copy()
    if kind == "edited":
        places = rng.integers(len(words), size=rng.integers(1, 7))
        words[places] = rng.integers(VOCABULARY, size=len(places))
    return words


def deduplicate(folder: Path, processes: int) -> dict[str, object]:
    """Returns seconds and memory of the work up to the written cluster map."""
    start = time.perf_counter()
    splits = sorted(folder.glob("*.jsonl"))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        worker_bytes = max(pool.map(describe, splits))
    described = time.perf_counter()
    exact = exact_duplicates(np.concatenate([np.load(f"{split}.exact.npy") for split in splits]))
    parts = [Signatures.load(split.with_suffix(".signatures")) for split in splits]
    near = near_duplicates(parts, MinHashConfig(), among=exact.is_kept)
    clusters = exact.then(near, np.arange(len(exact)))
    np.save(folder / "representatives.npy", clusters.representatives)
    np.save(folder / "jaccard.npy", clusters.jaccard)
    seconds = time.perf_counter() - start
    driver_bytes = peak_rss_bytes()
    return {
        "seconds": round(seconds, 1),
        "signatures_s": round(described - start, 1),
        "clusters_s": round(seconds - (described - start), 1),
        "documents_per_s": round(len(clusters) / seconds),
        "driver_peak_rss_gb": round(driver_bytes / 1e9, 2),
        "worker_peak_rss_gb": round(worker_bytes / 1e9, 2),
        "peak_rss_bound_gb": round((driver_bytes + processes * worker_bytes) / 1e9, 2),
    }


def describe(split: Path) -> int:
    """Writes exact keys and signatures of a split; returns the worker's peak memory in bytes."""
    texts = list(read(split))
    np.save(f"{split}.exact.npy", exact_keys(texts, ExactConfig()))
    signatures(texts, MinHashConfig()).save(split.with_suffix(".signatures"))
    return peak_rss_bytes()


def read(split: Path) -> Iterator[str]:
    with split.open() as file:
        yield from map(json.loads, file)


def peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def judge(folder: Path) -> dict[str, object]:
    """Compares the removed documents with the planted ones."""
    texts = [text for split in sorted(folder.glob("*.jsonl")) for text in read(split)]
    kinds, sources = np.load(folder / "kinds.npy"), np.load(folder / "sources.npy")
    representatives = np.load(folder / "representatives.npy")
    is_kept = representatives == np.arange(len(texts))
    tally: Counter[str] = Counter()
    for document in np.flatnonzero(kinds):
        similarity = jaccard(texts[document], texts[sources[document]])
        removed = not is_kept[document]
        tally["pairs_at_080"] += similarity >= 0.8
        tally["of_them_found"] += similarity >= 0.8 and bool(
            removed or not is_kept[sources[document]]
        )
        tally["pairs_at_050_or_less"] += similarity <= 0.5
    removed = np.flatnonzero(~is_kept)
    similarities = [jaccard(texts[d], texts[representatives[d]]) for d in removed]
    return {
        "removed": len(removed),
        **{key: int(value) for key, value in tally.items()},
        "recall": round(tally["of_them_found"] / tally["pairs_at_080"], 5),
        "least_jaccard_of_removed": round(min(similarities), 4),
        "removed_originals": int((~is_kept[kinds == 0]).sum()),
    }


def jaccard(first: str, second: str) -> float:
    a, b = triples(first), triples(second)
    return len(a & b) / len(a | b)


def triples(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return set(zip(words, words[1:], words[2:], strict=False))


if __name__ == "__main__":
    main()
