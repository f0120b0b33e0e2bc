"""Data files: JSON, JSONL, compressed; malformed ones are refused with the location."""

import bz2
import gzip
import json
import lzma

import pytest
import zstandard

from conversation_rows import FORMATS
from easyllm.core.errors import DataError
from easyllm.examples.conversations import (
    read_conversations,
)
from easyllm.examples.data_file import read_rows


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_jsonl_file_and_a_json_array_give_the_same_rows(tmp_path):
    rows = [FORMATS[name][1] for name in FORMATS]
    lines = write_lines(tmp_path / "data.jsonl", rows)
    array = tmp_path / "data.json"
    array.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    expected = [FORMATS[name][2] for name in FORMATS]
    assert [c.messages for c in read_conversations(lines)] == expected
    assert [c.messages for c in read_conversations(array)] == expected
    assert [row.location for row in read_rows(lines)][:2] == [f"{lines}:1", f"{lines}:2"]
    assert [row.location for row in read_rows(array)][:2] == [f"{array}[0]", f"{array}[1]"]


def test_blank_lines_are_skipped_but_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"a": 1}\n  \n\n{"a": 2}', encoding="utf-8")
    assert [row.location for row in read_rows(path)] == [f"{path}:2", f"{path}:5"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b'{"a": 1}\n{"a": \n', r"data\.jsonl:2 is not JSON"),
        ("data.jsonl", b'{"a": 1}\n{"a": "\xff\xfe"}\n', r"data\.jsonl:2 is not UTF-8"),
        (
            "data.jsonl",
            b'{"a": 1}\n\n[1]\n',
            r"data\.jsonl:3 contains a JSON list, expected an object",
        ),
        ("data.jsonl", b"[\n", r"data\.jsonl:1 is not JSON"),
        ("data.json", b'[{"a": 1}, 2]', r"data\.json\[1\] contains a JSON int, expected an object"),
        ("data.json", b'[{"a": 1}', r"data\.json' cannot be read to its end: not JSON"),
        ("data.jsonl", b"", r"data\.jsonl' is empty; give"),
        ("data.jsonl", b"\n \n", r"data\.jsonl' contains no rows; give"),
        ("data.json", b"[]", r"data\.json' contains no rows; give"),
        ("data.jsonl.gz", gzip.compress(b"", mtime=0), r"data\.jsonl\.gz' contains no rows"),
        (
            "data.jsonl.xz",
            lzma.compress(b'{"a": 1}')[:-9],
            r"data\.jsonl\.xz' cannot be read to its end: damaged",
        ),
        (
            "data.jsonl",
            gzip.compress(b"{}", mtime=0),
            r"contains gzip, not JSON; rename it to end in \.gz",
        ),
        ("data.jsonl", bz2.compress(b"{}"), r"contains bzip2, not JSON; rename it to end in \.bz2"),
        ("data.json", b"PK\x03\x04....", "contains a zip archive, not JSON; convert it"),
    ],
)
def test_a_malformed_file_is_refused_with_the_location(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(path))


COMPRESSED = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".XZ": lzma.compress,
}


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_a_compressed_file_gives_the_same_rows(tmp_path, name, suffix):
    rows = [{"prompt": "问", "completion": "答" * n} for n in range(50)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    content = json.dumps(rows) if name == "data.json" else lines
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(COMPRESSED[suffix](content.encode()))
    found = list(read_rows(path))
    assert [row.values for row in found] == rows
    assert found[1].location == f"{path}[1]" if name == "data.json" else f"{path}:2"


def test_jsonl_content_in_a_json_file_is_read(tmp_path):
    path = write_lines(tmp_path / "data.json", [{"a": 1}, {"a": 2}])
    assert [row.values for row in read_rows(path)] == [{"a": 1}, {"a": 2}]


def test_a_folder_is_refused_with_a_list_of_its_files(tmp_path):
    with pytest.raises(DataError, match=r"is a folder; name the files in it, which must be .*none"):
        list(read_rows(tmp_path))
    for name in ("b.jsonl", "a.json.gz", "notes.md"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"is a folder; .* \(it contains a\.json\.gz, b\.jsonl\)"):
        list(read_rows(tmp_path))


@pytest.mark.parametrize("name", ["data.parquet", "data.csv", "data.csv.gz"])
def test_a_file_with_another_suffix_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=rf"{name}' is a \.\w+ file, expected \.json .*convert it"):
        list(read_rows(tmp_path / name))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        list(read_rows(tmp_path / "data.jsonl"))
