"""The work items of a corpus build: functions on one split, run by local or remote processes.

Each function takes the paths of its input and output, writes its output atomically and returns
counts. `run_item` calls it and records the result next to the output, so that finished work is
never repeated.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from easyllm.core.atomic import write_json
from easyllm.core.json_types import JsonObject
from easyllm.core.manifest import hash_value
from easyllm.corpus.clean import CleanConfig, Cleaner, CleanReport
from easyllm.corpus.decontaminate import Decontaminator
from easyllm.corpus.dedup.config import DedupStep
from easyllm.corpus.dedup.steps import apply_verdict, save_keys
from easyllm.corpus.document import Document, Rejection
from easyllm.corpus.files.formats import BadRow
from easyllm.corpus.privacy import PrivacyConfig, redact
from easyllm.corpus.shards import token_dtype
from easyllm.corpus.sources import SourceConfig, Split, read_split
from easyllm.corpus.stage_files import SUFFIX, line_writer, read_documents
from easyllm.tokenizer.tokenizer import Tokenizer

BATCH = 256
"""Number of texts tokenized in one call."""
BAD_ROWS_SHOWN = 5

Counts = JsonObject


def run_item(item: JsonObject) -> Counts:
    """Runs a work item, or returns its recorded counts if it has already finished.

    The counts are recorded in `<stem>.json` with the hash of the item.

    Args:
        item: `work` is the name of the function, `stem` the path stem of its output files and
            `arguments` its other arguments.
    """
    key, stem = hash_value(item), Path(item["stem"])
    record = stem.with_name(stem.name + ".json")
    if (noted := finished(record, key)) is not None:
        return noted
    counts = WORK[item["work"]](stem, **item["arguments"])
    write_json(record, {"key": key, "counts": counts})
    return counts


def finished(record: Path, key: str) -> Counts | None:
    """Returns the counts of a finished work item.

    Args:
        record: the file in which the result is recorded.
        key: the hash of the item.

    Returns:
        None if the item has not finished, or the record is of an item with another hash.
    """
    try:
        noted = json.loads(record.read_text("utf-8"))
        return noted["counts"] if noted["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def documents_file(stem: Path) -> Path:
    """Returns the path of the documents that a work item keeps."""
    return stem.with_name(stem.name + SUFFIX)


def rejected_file(stem: Path) -> Path:
    """Returns the path of the documents that a work item rejects."""
    return stem.with_name(stem.name + ".rejected" + SUFFIX)


def clean(
    stem: Path,
    *,
    split: JsonObject,
    source: JsonObject,
    rules: JsonObject | None,
    privacy: JsonObject | None,
    evaluation: str | None,
) -> Counts:
    """Reads a split, and cleans, redacts and decontaminates its documents.

    Args:
        stem: path stem of the output files.
        split: the `Split` as a dict.
        source: its `SourceConfig` as a dict.
        rules: a `CleanConfig` as a dict; None skips cleaning.
        privacy: a `PrivacyConfig` as a dict; None skips redaction.
        evaluation: folder of a saved `Decontaminator`; None skips decontamination.
    """
    report, private, bad = CleanReport(), Counter[str](), Counter[str]()
    cleaner = None if rules is None else Cleaner(CleanConfig.model_validate(rules))
    hide = None if privacy is None else PrivacyConfig.model_validate(privacy)
    forbidden = None if evaluation is None else Decontaminator.load(Path(evaluation))
    shown: list[str] = []
    with line_writer(documents_file(stem)) as kept, line_writer(rejected_file(stem)) as rejected:
        for row in read_split(Split.from_dict(split), SourceConfig.model_validate(source)):
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
    return report.as_dict() | {"private": private, "bad_rows": bad, "bad_rows_shown": shown}


def dedup_keys(stem: Path, *, documents: str, step: JsonObject) -> Counts:
    """Writes the hashes that one deduplication step compares, and the ids of the documents.

    Args:
        stem: the output folder.
        documents: file of the split's documents.
        step: the `DedupStep` as a dict.
    """
    shutil.rmtree(stem, ignore_errors=True)
    ids: list[str] = []

    def texts() -> Iterator[str]:
        for document in read_documents(Path(documents)):
            ids.append(f"{document.source}/{document.id}")
            yield document.text

    save_keys(stem, texts(), TypeAdapter[DedupStep](DedupStep).validate_python(step))
    np.save(stem / "ids.npy", np.array(ids, dtype=np.str_))
    return {"documents": len(ids)}


def dedup_apply(stem: Path, *, documents: str, decision: str, step: JsonObject) -> Counts:
    """Applies the decision of a deduplication step to a split: removes documents or parts of them.

    Args:
        stem: path stem of the output files.
        documents: file of the split's documents.
        decision: the `.npz` file with the decision for this split.
        step: the `DedupStep` as a dict.
    """
    config = TypeAdapter[DedupStep](DedupStep).validate_python(step)
    removed = kept_count = cut = characters = 0
    verdicts = np.load(decision, allow_pickle=False)
    with line_writer(documents_file(stem)) as kept, line_writer(rejected_file(stem)) as rejected:
        for number, document in enumerate(read_documents(Path(documents))):
            result, parts = apply_verdict(document, number, verdicts, config)
            cut += parts
            if isinstance(result, Rejection):
                rejected.rejection(result)
                removed += 1
            else:
                kept.document(result)
                kept_count, characters = kept_count + 1, characters + len(result.text)
    return {"kept": kept_count, "removed": removed, "parts": cut, "characters_kept": characters}


def tokenize(stem: Path, *, documents: str, tokenizer: str, end_id: int | None) -> Counts:
    """Writes the concatenated token ids of a split's documents, with their lengths and text sizes.

    Args:
        stem: path stem of the output: `.bin` has the ids, `.npz` the `lengths` and `bytes` (int64).
        documents: file of the split's documents.
        tokenizer: folder of the tokenizer.
        end_id: appended to every document, if not None.
    """
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
