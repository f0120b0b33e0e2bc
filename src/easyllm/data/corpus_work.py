"""The work of a corpus on one split: what processes, here or on other machines, are sent.

Each function takes the places of its input and output, writes its output in one step and returns counts. `run_item` calls
it, and notes the outcome beside it, so that what is finished is never done again.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from easyllm.core.atomic import write_json
from easyllm.core.manifest import hash_value
from easyllm.data.clean import CleanConfig, Cleaner, CleanReport
from easyllm.data.decontaminate import Decontaminator
from easyllm.data.dedup.config import DedupStep
from easyllm.data.dedup.steps import cut_text, save_keys
from easyllm.data.document_files import SUFFIX, line_writer, read_documents
from easyllm.data.documents import Document, Rejection
from easyllm.data.privacy import PrivacyConfig, redact
from easyllm.data.readers import BadRow
from easyllm.data.shards import token_dtype
from easyllm.data.sources import SourceConfig, Split, read_split
from easyllm.tokenizer.tokenizer import Tokenizer

BATCH = 256
"""Texts tokenized together."""
BAD_ROWS_SHOWN = 5

Counts = dict[str, Any]


def run_item(item: dict[str, Any]) -> Counts:
    """Does an item of work, or reads what it gave before.

    `item`: `work` the function's name, `stem` where its files go, `arguments` the rest. The outcome is noted in
    `stem.json` with the item's hash.
    """
    key, stem = hash_value(item), Path(item["stem"])
    record = stem.with_name(stem.name + ".json")
    if (noted := finished(record, key)) is not None:
        return noted
    counts = WORK[item["work"]](stem, **item["arguments"])
    write_json(record, {"key": key, "counts": counts})
    return counts


def finished(record: Path, key: str) -> Counts | None:
    """The counts of an item that is done, by its record; None where it is not, or was another item."""
    try:
        noted = json.loads(record.read_text("utf-8"))
        return noted["counts"] if noted["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def documents_file(stem: Path) -> Path:
    """Where the documents an item keeps lie."""
    return stem.with_name(stem.name + SUFFIX)


def rejected_file(stem: Path) -> Path:
    """Where those it rejects lie."""
    return stem.with_name(stem.name + ".rejected" + SUFFIX)


def clean(
    stem: Path,
    *,
    split: dict[str, Any],
    source: dict[str, Any],
    rules: dict[str, Any] | None,
    privacy: dict[str, Any] | None,
    evaluation: str | None,
) -> Counts:
    """Reads a split; cleans, redacts and decontaminates its documents."""
    report, private, bad = CleanReport(), Counter[str](), Counter[str]()
    cleaner = None if rules is None else Cleaner(CleanConfig.model_validate(rules))
    hide = None if privacy is None else PrivacyConfig.model_validate(privacy)
    forbidden = None if evaluation is None else Decontaminator.load(Path(evaluation))
    shown: list[str] = []
    with line_writer(documents_file(stem)) as kept, line_writer(rejected_file(stem)) as rejected:
        for row in read_split(Split.from_dict(split), SourceConfig.model_validate(source)):
            if isinstance(row, BadRow):
                bad[row.kind] += 1
                rejected.write({"rule": "bad_row", "value": row.reason, "id": row.place})
                shown += [f"{row.place}: {row.reason}"] if len(shown) < BAD_ROWS_SHOWN else []
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
    return report.as_dict() | {"private": private, "bad_rows": bad, "bad_rows_shown": shown}


def dedup_keys(stem: Path, *, documents: str, step: dict[str, Any]) -> Counts:
    """The hashes one step of deduplication compares, with the documents' ids."""
    shutil.rmtree(stem, ignore_errors=True)
    ids: list[str] = []

    def texts() -> Iterator[str]:
        for document in read_documents(Path(documents)):
            ids.append(f"{document.source}/{document.id}")
            yield document.text

    save_keys(stem, texts(), TypeAdapter[DedupStep](DedupStep).validate_python(step))
    np.save(stem / "ids.npy", np.array(ids, dtype=np.str_))
    return {"documents": len(ids)}


def dedup_apply(stem: Path, *, documents: str, decision: str, step: dict[str, Any]) -> Counts:
    """Removes documents, or cuts out parts of them, as the decision about the split says."""
    config = TypeAdapter[DedupStep](DedupStep).validate_python(step)
    removed = kept_count = cut = characters = 0
    verdicts = np.load(decision, allow_pickle=False)
    with line_writer(documents_file(stem)) as kept, line_writer(rejected_file(stem)) as rejected:
        for number, document in enumerate(read_documents(Path(documents))):
            result, parts = cut_text(document, number, verdicts, config)
            cut += parts
            if isinstance(result, Rejection):
                rejected.rejection(result)
                removed += 1
            else:
                kept.document(result)
                kept_count, characters = kept_count + 1, characters + len(result.text)
    return {"kept": kept_count, "removed": removed, "parts": cut, "characters_kept": characters}


def tokenize(stem: Path, *, documents: str, tokenizer: str, end_id: int | None) -> Counts:
    """Ids of a split's documents, end to end, with their lengths and the bytes of their texts."""
    tok = Tokenizer.from_folder(Path(tokenizer))
    dtype = token_dtype(tok.vocab_size)
    end = [] if end_id is None else [end_id]
    lengths, sizes = [], []
    tokens_file = stem.with_name(stem.name + ".bin")
    with tokens_file.open("wb") as file:
        for texts in _batches(read_documents(Path(documents))):
            for text, ids in zip(texts, tok.encode_documents(texts), strict=True):
                np.array(ids + end, dtype=dtype).tofile(file)
                lengths.append(len(ids) + len(end))
                sizes.append(len(text.encode("utf-8")))
    np.savez(
        stem.with_name(stem.name + ".npz"),
        lengths=np.array(lengths, dtype=np.int64),
        bytes=np.array(sizes, dtype=np.int64),
    )
    return {"documents": len(lengths), "tokens": sum(lengths), "bytes": sum(sizes)}


def _batches(documents: Iterator[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    for document in documents:
        texts.append(document.text)
        if len(texts) == BATCH:
            yield texts
            texts = []
    if texts:
        yield texts


WORK: dict[str, Callable[..., Counts]] = {
    "clean": clean,
    "dedup_keys": dedup_keys,
    "dedup_apply": dedup_apply,
    "tokenize": tokenize,
}
