"""Reading in bounded memory: large files, too long rows, block boundaries."""

import gzip
import json
import tracemalloc

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from document_files import (
    RANDOM,
    bad,
    csv_bytes,
    good,
    json_lines,
    parquet_bytes,
    read,
    read_content,
    texts,
)
from easyllm.corpus.files import blocks
from easyllm.corpus.files.blocks import Delimiter, split_records
from easyllm.corpus.files.formats import BadRow
from easyllm.corpus.sources import SourceConfig, list_splits, read_split

# limits


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "big.jsonl"
    path.write_bytes(json_lines([{"text": "tea " * 5000}]) * 2500)  # 50 MB in lines of 20 kB
    config = SourceConfig(paths=str(path))
    tracemalloc.start()
    try:
        total = sum(
            len(item.text)
            for split in list_splits("s", config)
            for item in read_split(split, config)
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == 2500 * 20_000
    assert peak < 3_000_000


@pytest.mark.parametrize("name", ["f.json", "f.csv", "f.jsonl.gz", "f.txt"])
def test_memory_does_not_grow_with_other_formats(tmp_path, name):
    rows = [{"text": "tea " * 2500}] * 1000  # 10 MB
    contents = {
        "f.json": json.dumps(rows).encode(),
        "f.csv": csv_bytes(rows),
        "f.jsonl.gz": gzip.compress(json_lines(rows), 1),
        "f.txt": b"\n\n".join([rows[0]["text"].encode()] * 1000),
    }
    (tmp_path / name).write_bytes(contents.pop(name))
    contents.clear()
    separator = "\n\n" if name == "f.txt" else None
    config = SourceConfig(paths=str(tmp_path / name), document_separator=separator)
    (split,) = list_splits("s", config)
    tracemalloc.start()
    try:
        assert sum(len(item.text) for item in read_split(split, config)) == 10_000_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000


def test_a_large_row_group_is_decoded_in_pieces(tmp_path):
    rows = [{"id": i, "text": RANDOM.randbytes(20_000).hex()} for i in range(1500)]  # 60 MB
    path = tmp_path / "f.parquet"
    path.write_bytes(parquet_bytes(rows, use_dictionary=False, write_batch_size=16))
    config = SourceConfig(paths=str(path))
    (split,) = list_splits("s", config)
    before, peak = pyarrow.total_allocated_bytes(), 0
    for item, row in zip(read_split(split, config), rows, strict=True):
        assert item.text == row["text"]
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert 0 < peak < 25_000_000


@pytest.fixture
def small_limit(monkeypatch):
    for module in ("files.blocks", "files.formats", "files.tables", "document_fields"):
        monkeypatch.setattr(f"easyllm.corpus.{module}.MAX_BYTES", 1000)
    monkeypatch.setattr("easyllm.corpus.files.blocks.BLOCK_BYTES", 300)


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("delimiter", ["\n", "||"])
def test_an_overlong_record_is_skipped_in_bounded_memory(delimiter):
    def content():
        yield from (b"good", delimiter.encode())
        for _ in range(10_000):
            yield b"|x" * 250
        yield from (delimiter.encode(), b"good")

    tracemalloc.start()
    try:
        records = list(split_records(content(), Delimiter.from_text(delimiter)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert records == [b"good", None, b"good"]
    assert peak < 50_000


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("size", [1, 7, 300, 4000])
def test_the_limit_does_not_depend_on_block_boundaries(size):
    content = b"\n".join(b"x" * n for n in (999, 1000, 1001, 1299, 5, 1300, 1001))
    pieces = [content[i : i + size] for i in range(0, len(content), size)]
    lengths = [None if record is None else len(record) for record in split_records(pieces)]
    assert lengths == [999, 1000, None, None, 5, None, None]


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("delimiter", ["\n", "|", "||"])
def test_an_overlong_record_at_the_end_is_reported(delimiter):
    content = [b"good" + delimiter.encode(), b"x" * 5000]
    assert list(split_records(content, Delimiter.from_text(delimiter))) == [b"good", None]


@pytest.mark.usefixtures("small_limit")
def test_the_limit_applies_to_a_row_not_to_a_table(tmp_path):
    rows = [{"text": "x" * 900}] * 20
    assert len(texts(read_content(tmp_path, "f.csv", csv_bytes(rows)))) == 20


def test_an_array_broken_early_is_not_read_further(tmp_path):
    path = tmp_path / "f.json"
    path.write_bytes(b'[{"text": "good"}, oops' + b" " * 20_000_000)
    (split,) = list_splits("s", SourceConfig(paths=str(path)))
    tracemalloc.start()
    try:
        _, item = read_split(split, SourceConfig(paths=str(path)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(item, BadRow)
    assert peak < 3_000_000


@pytest.mark.parametrize("block_bytes", range(4, 30))
def test_numbers_in_an_array_are_not_split_at_block_boundaries(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    items = read_content(tmp_path, "f.json", b'[1234567, true, -1.5e+10, {"text": "a"}, 98765432]')
    assert [getattr(item, "reason", "").split(",")[0] for item in items] == [
        *("a JSON int", "a JSON bool", "a JSON float", "", "a JSON int")
    ]


@pytest.mark.usefixtures("small_limit")
def test_an_overlong_row_is_a_bad_row_in_every_format(tmp_path):
    long, short = {"text": "x" * 5000}, {"text": "good"}
    rows = [short, long, short]
    quoted = b'text\ngood\n"' + b'x","x\n' * 999
    for name, content, kept, options in (
        ("f.jsonl", json_lines(rows), 2, {}),
        ("f.json", json.dumps(rows).encode(), 1, {}),
        ("f.csv", csv_bytes(rows), 1, {}),
        ("g.csv", quoted, 1, {}),
        ("f.parquet", parquet_bytes(rows), 2, {}),
        ("f.txt", b"good\n" + b"x" * 5000 + b"\ngood", 2, {"documents": "line"}),
        ("f.txt", b"good||" + b"x|" * 2500 + b"|good", 2, {"document_separator": "||"}),
        ("f.txt", b"good||" + b"x|" * 2500, 1, {"document_separator": "||"}),
        ("f.txt", b"x" * 5000, 0, {}),
        ("f.md", b"x" * 5000, 0, {}),
        ("f.html", b"x" * 5000, 0, {}),
    ):
        items = read_content(tmp_path, name, content, **options)
        assert texts(good(items)) == ["good"] * kept, name
        (row,) = bad(items)
        assert "longer than 64 MiB" in row.reason, name


def test_a_field_of_a_table_may_be_longer_than_the_csv_modules_limit(tmp_path):
    text = "tea\n" * 100_000
    (item,) = read_content(tmp_path, "f.csv", csv_bytes([{"text": text}]))
    assert item.text == text


def test_csv_locations_are_lines_of_the_file(tmp_path):
    content = b'text\n"a\nb"\n\nc\n"d\n\ne"\nf\n'
    items = read_content(tmp_path, "f.csv", content)
    assert [(item.id, item.text) for item in items] == [
        *[("f.csv:2", "a\nb"), ("f.csv:5", "c"), ("f.csv:6", "d\n\ne"), ("f.csv:9", "f")],
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=40)), max_size=8
    ),
    st.integers(1, 50),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_reading_an_array_does_not_depend_on_block_boundaries(
    monkeypatch_module, tmp_path_factory, rows, block_bytes, indent, is_ascii
):
    monkeypatch_module.setattr(blocks, "BLOCK_BYTES", block_bytes)
    rows = [row | {"text": f"t{i}"} for i, row in enumerate(rows)]
    path = tmp_path_factory.getbasetemp() / "f.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=is_ascii), encoding="utf-8")
    items = read(SourceConfig(paths=str(path)))
    assert texts(items) == [row["text"] for row in rows]


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch
