"""The work of a corpus build: functions of one work item, run by local or remote processes.

Each function writes the output of an item atomically and returns counts. `RecordedWork` calls it
and records the result next to the output, so that finished work is never repeated.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from easyllm.core.atomic import write_json
from easyllm.core.manifest import hash_value
from easyllm.corpus.clean import Cleaner, CleanReport
from easyllm.corpus.codec import from_json, to_json
from easyllm.corpus.decontaminate import Decontaminator
from easyllm.corpus.dedup.steps import apply_verdict, save_keys
from easyllm.corpus.document import Document, Rejection
from easyllm.corpus.files.formats import BadRow
from easyllm.corpus.items import (
    CleanCounts,
    CleanItem,
    DedupCounts,
    DedupItem,
    KeyCounts,
    KeyItem,
    TokenCounts,
    TokenizeItem,
    WorkItem,
)
from easyllm.corpus.privacy import redact
from easyllm.corpus.shards import token_dtype
from easyllm.corpus.sources import read_split
from easyllm.corpus.stage_files import SUFFIX, line_writer, read_documents
from easyllm.tokenizer.tokenizer import Tokenizer

BATCH = 256
"""Number of texts tokenized in one call."""
BAD_ROWS_SHOWN = 5

Item = TypeVar("Item", bound=WorkItem)
Counts = TypeVar("Counts")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedWork(Generic[Item, Counts]):
    """Work whose counts are recorded in `<stem>.json` with the hash of the item.

    Attributes:
        function: does the work; a module-level function, because it is pickled by name.
        item_type: the class of its items.
        result_type: the class of its counts.
    """

    function: Callable[[Item], Counts]
    item_type: type[Item]
    result_type: type[Counts]

    def __call__(self, item: Item) -> Counts:
        """Does the work of an item, or returns its recorded counts if it has already finished."""
        if (noted := self.finished(item)) is not None:
            return noted
        counts = self.function(item)
        write_json(record_file(item.stem), {"key": item_key(item), "counts": to_json(counts)})
        return counts

    def finished(self, item: Item) -> Counts | None:
        """Returns the recorded counts of an item.

        Returns:
            None if the item has not finished, or the record is of an item with another hash.
        """
        key = item_key(item)
        try:
            noted = json.loads(record_file(item.stem).read_text("utf-8"))
            return from_json(self.result_type, noted["counts"]) if noted["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def item_key(item: WorkItem) -> str:
    """Returns the SHA-256 that identifies a work item and its input."""
    return hash_value(to_json(item))


def record_file(stem: Path) -> Path:
    """Returns the path of the record of a finished work item."""
    return stem.with_name(stem.name + ".json")


def documents_file(stem: Path) -> Path:
    """Returns the path of the documents that a work item keeps."""
    return stem.with_name(stem.name + SUFFIX)


def rejected_file(stem: Path) -> Path:
    """Returns the path of the documents that a work item rejects."""
    return stem.with_name(stem.name + ".rejected" + SUFFIX)


def clean(item: CleanItem) -> CleanCounts:
    """Reads a split, and cleans, redacts and decontaminates its documents."""
    report, private, bad = CleanReport(), Counter[str](), Counter[str]()
    stem, task = item.stem, item.arguments
    hide = task.privacy
    cleaner = None if task.rules is None else Cleaner(task.rules)
    forbidden = None if task.evaluation is None else Decontaminator.load(task.evaluation)
    shown: list[str] = []
    with line_writer(documents_file(stem)) as kept, line_writer(rejected_file(stem)) as rejected:
        for row in read_split(task.split, task.source):
            if isinstance(row, BadRow):
                bad[row.kind] += 1
                rejected.write({"rule": "bad_row", "value": row.reason, "id": row.location})
                shown += [f"{row.location}: {row.reason}"] if len(shown) < BAD_ROWS_SHOWN else []
                continue
            result: Document | Rejection = row if cleaner is None else cleaner.clean(row)
            if isinstance(result, Document) and hide is not None:
                text, found = redact(result.text, hide)
                private.update(found)
                result = replace(result, text=text)
            if isinstance(result, Document) and forbidden is not None:
                result = forbidden.check(result) or result
            report.count(row, result)
            if isinstance(result, Rejection):
                rejected.rejection(result)
            else:
                kept.document(result)
    return CleanCounts.from_report(
        report, private=private, bad_rows=bad, bad_rows_shown=tuple(shown)
    )


def dedup_keys(item: KeyItem) -> KeyCounts:
    """Writes the hashes that one deduplication step compares, and the ids of the documents."""
    stem, task = item.stem, item.arguments
    shutil.rmtree(stem, ignore_errors=True)
    ids: list[str] = []

    def texts() -> Iterator[str]:
        for document in read_documents(task.documents):
            ids.append(f"{document.source}/{document.id}")
            yield document.text

    save_keys(stem, texts(), task.step)
    np.save(stem / "ids.npy", np.array(ids, dtype=np.str_))
    return KeyCounts(documents=len(ids))


def dedup_apply(item: DedupItem) -> DedupCounts:
    """Applies the decision of a deduplication step to a split: removes documents or parts."""
    stem, task = item.stem, item.arguments
    removed = kept_count = cut = characters = 0
    verdicts = np.load(task.decision, allow_pickle=False)
    with line_writer(documents_file(stem)) as kept, line_writer(rejected_file(stem)) as rejected:
        for number, document in enumerate(read_documents(task.documents)):
            result, parts = apply_verdict(document, number, verdicts, task.step)
            cut += parts
            if isinstance(result, Rejection):
                rejected.rejection(result)
                removed += 1
            else:
                kept.document(result)
                kept_count, characters = kept_count + 1, characters + len(result.text)
    return DedupCounts(kept=kept_count, removed=removed, parts=cut, characters_kept=characters)


def tokenize(item: TokenizeItem) -> TokenCounts:
    """Writes the concatenated token ids of a split's documents, with their lengths and text sizes.

    The `.bin` file has the ids, the `.npz` file the `lengths` and `bytes` (int64) of the documents.
    """
    stem, task = item.stem, item.arguments
    tok = Tokenizer.from_folder(task.tokenizer)
    dtype = token_dtype(tok.vocab_size)
    end = [] if task.end_id is None else [task.end_id]
    lengths, sizes = [], []
    tokens_file = stem.with_name(stem.name + ".bin")
    with tokens_file.open("wb") as file:
        for texts in _batches(read_documents(task.documents)):
            for text, ids in zip(texts, tok.encode_documents(texts), strict=True):
                np.array(ids + end, dtype=dtype).tofile(file)
                lengths.append(len(ids) + len(end))
                sizes.append(len(text.encode("utf-8")))
    np.savez(
        stem.with_name(stem.name + ".npz"),
        lengths=np.array(lengths, dtype=np.int64),
        bytes=np.array(sizes, dtype=np.int64),
    )
    return TokenCounts(documents=len(lengths), tokens=sum(lengths), bytes=sum(sizes))


def _batches(documents: Iterator[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    for document in documents:
        texts.append(document.text)
        if len(texts) == BATCH:
            yield texts
            texts = []
    if texts:
        yield texts


CLEAN = RecordedWork(function=clean, item_type=CleanItem, result_type=CleanCounts)
DEDUP_KEYS = RecordedWork(function=dedup_keys, item_type=KeyItem, result_type=KeyCounts)
DEDUP_APPLY = RecordedWork(function=dedup_apply, item_type=DedupItem, result_type=DedupCounts)
TOKENIZE = RecordedWork(function=tokenize, item_type=TokenizeItem, result_type=TokenCounts)
