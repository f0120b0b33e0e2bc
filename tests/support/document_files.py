"""Files of documents in every format, and reading them as a source."""

import csv
import io
import json
import pickle
import random

import pyarrow
from pyarrow import parquet

from easyllm.corpus.codec import decode, encode
from easyllm.corpus.document import Document
from easyllm.corpus.files.formats import BadRow
from easyllm.corpus.sources import SourceConfig, Split, list_splits, read_split

RANDOM = random.Random(0)


ROWS = [
    {"id": "a", "text": "Tea is a drink.\nIt is hot.", "lang": "en-GB"},
    {"id": "b", "text": '茶是一种饮料, "热"的。', "lang": "zh_Hans"},
    {"id": "c", "text": "𝄞 Le thé\r\nest chaud. ", "lang": "fr"},
]


def read(config, *, split_bytes=1 << 26):
    """Reads everything in a source, with its splits sent through JSON and pickle."""
    splits = list_splits("s", config, split_bytes=split_bytes)
    sent = [decode(Split, encode(split)) for split in splits]
    assert sent == splits == pickle.loads(pickle.dumps(splits))
    return [item for split in sent for item in read_split(split, config)]


def read_content(folder, name, content, **options):
    path = folder / name
    path.write_bytes(content)
    return read(SourceConfig(paths=str(path), **options))


def texts(items):
    assert all(isinstance(item, Document) for item in items), items
    return [item.text for item in items]


def good(items):
    return [item for item in items if isinstance(item, Document)]


def bad(items):
    return [item for item in items if isinstance(item, BadRow)]


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def csv_bytes(rows, delimiter=","):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def parquet_bytes(rows, **options):
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, **options)
    return file.getvalue()


def zst(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()
