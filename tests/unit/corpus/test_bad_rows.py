"""Bad rows and files are named, and everything that can be read is read."""

import bz2
import gzip
import io
import lzma
import re

import pyarrow
import pytest
from pyarrow import parquet

from document_files import (
    RANDOM,
    ROWS,
    bad,
    csv_bytes,
    good,
    json_lines,
    parquet_bytes,
    read,
    read_content,
    texts,
    zst,
)
from easyllm.core.errors import DataError, SourceError
from easyllm.corpus.document_fields import EMPTY_TEXT
from easyllm.corpus.files.formats import BadRow
from easyllm.corpus.sources import SourceConfig, list_splits, read_split

# bad rows

OK = b'{"text": "good"}\n'


BAD = {
    "no JSON": ("f.jsonl", OK + b'{"text": \n' + OK, "f.jsonl:2", "not JSON"),
    "no UTF-8": ("f.jsonl", OK + b'{"text": "\xff"}\n' + OK, "f.jsonl:2", "not UTF-8 .*0xff at 10"),
    "no UTF-8 in another key": ("f.jsonl", b'{"a": "\xe9"}\n' + OK, "f.jsonl:1", "not UTF-8"),
    "an array in lines": ("f.jsonl", b"[1]\n" + OK, "f.jsonl:1", "JSON list, expected an object"),
    "no text": ("f.jsonl", b'{"a": 1, "b": 2}\n' + OK, "f.jsonl:1", r"'text' \(keys: a, b\)"),
    "no keys": ("f.jsonl", b"{}\n" + OK, "f.jsonl:1", r"\(keys: none\)"),
    "null": ("f.jsonl", b'{"text": null}\n' + OK, "f.jsonl:1", "type NoneType"),
    "a number": ("f.jsonl", b'{"text": 1}\n' + OK, "f.jsonl:1", "type int"),
    "half a pair": ("f.jsonl", b'{"text": "\\ud800"}\n' + OK, "f.jsonl:1", "surrogate"),
    "half a pair in the id": (
        *("f.jsonl", b'{"id": "\\udfff", "text": "x"}\n' + OK, "f.jsonl:1", "surrogate"),
    ),
    "half a pair as a key": ("f.jsonl", b'{"\\ud800": 1}\n' + OK, "f.jsonl:1", r"ud800"),
    "deep": ("f.jsonl", b"[" * 200_000 + b"\n" + OK, "f.jsonl:1", "deep"),
    "digits": ("f.jsonl", b'{"a": ' + b"1" * 9999 + b"}\n" + OK, "f.jsonl:1", "not JSON"),
    "empty": ("f.jsonl", b'{"text": " \\n\\t\\u3000"}\n' + OK, "f.jsonl:1", EMPTY_TEXT),
    "a number in an array": ("f.json", b'[1, 23, {"text": "good"}]', "f.json[0]", "JSON int"),
    "bytes in an array": ("f.json", b'[{"text": "\xff"}, ' + OK + b"]", "f.json[0]", "UTF-8"),
    "fields": ("f.csv", b"id,text\n1,good\n2\n", "f.csv:3", "1 fields, .* header has 2"),
    "commas": ("f.csv", b"id,text\n1,good\n2,a,b\n", "f.csv:3", "3 fields, .* header has 2"),
    "quotes": ("f.csv", b'id,text\n1,"a"b"\n2,good\n', "f.csv:2", "not CSV"),
    "an open quote": (
        "f.csv",
        b'id,text\n1,good\n2,"a\nb\n',
        "f.csv:3",
        "not CSV .*unexpected end",
    ),
    "bytes in a table": ("f.csv", b"id,text\n1,good\n2,\xff\n", "f.csv:3", "UTF-8"),
    "a bare return": ("f.csv", b"id,text\n1,good\n2,a\rb\n", "f.csv:3", "not CSV"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_and_the_others_are_read(tmp_path, case):
    name, content, location, reason = BAD[case]
    items = read_content(tmp_path, name, content)
    assert set(texts(good(items))) == {"good"}
    first = bad(items)[0]
    assert first.location == location
    assert re.search(reason, first.reason), first.reason
    first.reason.encode()


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_stops_a_strict_source_unless_it_is_empty(tmp_path, case):
    name, content, location, reason = BAD[case]
    if reason == EMPTY_TEXT:
        assert len(read_content(tmp_path, name, content, on_error="stop")) == 2
        return
    with pytest.raises(DataError, match="set on_error: skip") as caught:
        read_content(tmp_path, name, content, on_error="stop")
    assert str(caught.value).startswith(f"{location}: ")


BAD_FILES = {
    "no UTF-8": ("f.txt", b"ab\xb2\xe8", "not UTF-8 .*0xb2 at 2"),
    "a picture": ("f.txt", b"\x89PNG\r\n\x1a\n\0\0", "NUL"),
    "UTF-16 without a mark": ("f.md", "text".encode("utf-16-le"), "NUL"),
    "half a pair in UTF-16": ("f.txt", b"\xff\xfea\0\x00\xd8", "not UTF-8"),
    "truncated UTF-16": ("f.txt", b"\xff\xfea\0b", "not UTF-16"),
    "no bytes": ("f.txt", b"", EMPTY_TEXT),
    "no text": ("f.md", b"---\na: b\n---\n<!-- x -->\n", EMPTY_TEXT),
    "no page": ("f.html", b"<html><script>x()</script></html>", EMPTY_TEXT),
    "a picture as a page": ("f.html", bytes(range(256)) * 9, "not valid text in"),
    "deep": ("f.html", b"<div><!--</div>-->" * 99_999 + b"x", "deeper than 512"),
    "no gzip": ("f.txt.gz", b"plain", "damaged gzip"),
    "no zstd": ("f.txt.zst", b"plain text", "damaged stream"),
    "no Parquet": ("f.parquet", b"plain text, long enough", "not a Parquet|damaged Parquet"),
    "no bytes of Parquet": ("f.parquet", b"", "damaged Parquet"),
    "no header": ("f.csv", b'"text\n', "not CSV"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named(tmp_path, case):
    name, content, reason = BAD_FILES[case]
    (item,) = read_content(tmp_path, name, content)
    assert isinstance(item, BadRow)
    assert item.location == name
    assert re.search(reason, item.reason), item.reason
    if reason != EMPTY_TEXT:
        with pytest.raises(DataError, match=f"^{name}: "):
            read_content(tmp_path, name, content, on_error="stop")


@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.csv", "f.jsonl.gz", "f.jsonl.zst"])
def test_a_file_without_rows_is_not_an_error(tmp_path, name):
    assert read_content(tmp_path, name, b"" if name != "f.jsonl.gz" else gzip.compress(b"")) == []


def test_a_table_without_rows_is_not_an_error(tmp_path):
    schema = pyarrow.schema({"text": pyarrow.string()})
    parquet.write_table(schema.empty_table(), tmp_path / "f.parquet")
    assert read(SourceConfig(paths=str(tmp_path), on_error="stop")) == []
    assert read_content(tmp_path, "f.csv", b"id,text\n\n", on_error="stop") == []


@pytest.mark.parametrize(
    ("suffix", "pack", "damage"),
    [
        *[(".gz", gzip.compress, "cut"), (".gz", gzip.compress, "flipped"), (".zst", zst, "cut")],
        *[(".xz", lzma.compress, "cut"), (".xz", lzma.compress, "flipped")],
        *[(".bz2", bz2.compress, "cut"), (".bz2", bz2.compress, "flipped")],
    ],
)
def test_a_damaged_stream_keeps_the_rows_before_the_damage(tmp_path, suffix, pack, damage):
    rows = [{"text": RANDOM.randbytes(40).hex()} for _ in range(20_000)]
    packed = bytearray(pack(json_lines(rows)))
    middle = len(packed) // 2
    if damage == "cut":
        del packed[middle:]
    else:
        packed[middle : middle + 64] = b"\xff" * 64
    *documents, last = read_content(tmp_path, f"f.jsonl{suffix}", bytes(packed))
    kept = good(documents)
    assert len(kept) > 3000
    assert texts(kept[:3000]) == [row["text"] for row in rows[:3000]]
    assert isinstance(last, BadRow)
    assert "the rest of the file cannot be read: damaged" in last.reason
    assert int(last.location.rpartition(":")[2]) >= len(kept)


@pytest.mark.parametrize(
    ("content", "kept", "reason"),
    [
        (b'[{"text": "a"}, {"text": "b"}', 2, "expected ',', got the end"),
        (b'[{"text": "a"}, {"text": "b"', 1, "not JSON"),
        (b'[{"text": "a"} {"text": "b"}]', 1, "expected ',', got '{'"),
        (b'[{"text": "a"}, {"text": b}]', 1, "Expecting value"),
        (b'[{"text": "a"}] x', 1, "got 'x' after"),
        (b'[{"text": "a"}, ' + b"[" * 200_000, 1, "recursion"),
        (b'{\n"text": "a"\n}\n{\n"text": oops\n}', 1, "Expecting value"),
    ],
)
def test_a_broken_array_keeps_the_rows_before_the_error(tmp_path, content, kept, reason):
    *documents, last = read_content(tmp_path, "f.json", content)
    assert texts(documents) == ["a", "b"][:kept]
    assert last.location == f"f.json[{kept - 1}]"
    assert reason in last.reason


def test_invalid_text_in_parquet_is_a_bad_row(tmp_path):
    offsets = pyarrow.array([0, 1, 2], pyarrow.int32()).buffers()[1]
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(b"\xffa")]
    )
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "f.parquet")
    first, second = read(SourceConfig(paths=str(tmp_path / "f.parquet")))
    assert (first.location, second.text) == ("f.parquet[0]", "a")


def test_a_damaged_parquet_page_loses_only_its_row_group(tmp_path):
    rows = [{"text": f"{i} tea"} for i in range(3000)]
    content = bytearray(parquet_bytes(rows, row_group_size=1000, use_dictionary=False))
    page = parquet.ParquetFile(io.BytesIO(content)).metadata.row_group(1).column(0).data_page_offset
    content[page : page + 16] = b"\xff" * 16
    items = read_content(tmp_path, "f.parquet", bytes(content))
    assert texts(good(items)) == [row["text"] for row in (*rows[:1000], *rows[2000:])]
    assert [item.id for item in good(items)[999:1001]] == ["f.parquet[999]", "f.parquet[2000]"]
    (row,) = bad(items)
    assert row.location == "f.parquet[1000]"
    assert "row group 1" in row.reason


@pytest.mark.parametrize("on_error", ["skip", "stop"])
@pytest.mark.parametrize("name", ["f.csv", "f.csv.gz", "f.parquet"])
def test_a_table_without_the_column_is_refused_before_any_work(tmp_path, name, on_error):
    rows = [{"key": 1, "body": "x"}]
    content = parquet_bytes(rows) if name == "f.parquet" else csv_bytes(rows)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for options, message in (
        ({}, r"no column 'text' \(columns: key, body\).*set text_key"),
        ({"text_key": "bodi"}, r"did you mean 'body'"),
        ({"text_key": "body", "id_key": "id"}, "no column 'id' .*set id_key"),
        ({"text_key": "body", "language_key": "l"}, "no column 'l' .*set language_key"),
    ):
        config = SourceConfig(paths=str(tmp_path / name), on_error=on_error, **options)
        with pytest.raises(DataError, match=message):
            list_splits("s", config)


def test_a_parquet_column_of_numbers_is_not_text(tmp_path):
    with pytest.raises(DataError, match="column 'text' does not contain text"):
        read_content(tmp_path, "f.parquet", parquet_bytes([{"text": 1}]))


def test_a_missing_file_stops_every_source(tmp_path):
    for name, content in (("f.jsonl", OK), ("f.parquet", parquet_bytes(ROWS)), ("f.t.zst", b"")):
        (tmp_path / name).write_bytes(content)
        config = SourceConfig(paths=str(tmp_path / name), format="auto" if content else "text")
        (split,) = list_splits("s", config)
        (tmp_path / name).unlink()
        with pytest.raises(SourceError, match=f"cannot read '.*{name}': No such file"):
            list(read_split(split, config))
