"""Sources of documents: the same documents in all formats, encodings and splits."""

import bz2
import gzip
import itertools
import json
import lzma
import sys

import pyarrow
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from document_files import (
    ROWS,
    csv_bytes,
    json_lines,
    parquet_bytes,
    read,
    read_content,
    texts,
    zst,
)
from easyllm.core.errors import ConfigError
from easyllm.corpus.document import Document
from easyllm.corpus.files import blocks
from easyllm.corpus.files.blocks import LINE, Delimiter, split_records
from easyllm.corpus.sources import OPENING_BYTES, SourceConfig, list_splits

DOCUMENTS = [
    Document(id=row["id"], source="s", text=row["text"], language=language)
    for row, language in zip(ROWS, ("en", "zh", "fr"), strict=True)
]


CONTENTS = {
    "rows.jsonl": json_lines(ROWS),
    "rows.ndjson": json_lines(ROWS).rstrip(),
    "rows.json": json.dumps(ROWS, indent=2).encode(),
    "ascii.json": json.dumps(ROWS).encode(),
    "lines.json": json_lines(ROWS),
    "one_after_another.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "rows.csv": csv_bytes(ROWS),
    "rows.tsv": csv_bytes(ROWS, "\t"),
}


@pytest.mark.parametrize("compression", ["", ".gz", ".zst", ".GZ", ".xz", ".bz2"])
@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_gives_the_same_documents(tmp_path, name, compression):
    packs = {"": bytes, ".zst": zst, ".xz": lzma.compress, ".bz2": bz2.compress}
    pack = packs.get(compression, gzip.compress)
    items = read_content(tmp_path, name + compression, pack(CONTENTS[name]), language_key="lang")
    assert items == DOCUMENTS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_byte_order_mark_determines_the_encoding(tmp_path, name, encoding):
    content = CONTENTS[name].decode().encode(encoding)
    assert read_content(tmp_path, name, content, language_key="lang") == DOCUMENTS


def test_a_byte_order_mark_may_be_split_between_blocks(tmp_path):
    content = CONTENTS["rows.jsonl"].decode().encode("utf-16")
    packed = b"".join(gzip.compress(content[i : i + 1]) for i in range(4))
    items = read_content(tmp_path, "f.jsonl.gz", packed + gzip.compress(content[4:]))
    assert texts(items) == [row["text"] for row in ROWS]


def test_concatenated_compressed_members_are_one_stream(tmp_path):
    lines = CONTENTS["rows.jsonl"].splitlines(keepends=True)
    packs = {".gz": gzip.compress, ".zst": zst, ".xz": lzma.compress, ".bz2": bz2.compress}
    for suffix, pack in packs.items():
        content = b"".join(map(pack, lines))
        items = read_content(tmp_path, f"rows.jsonl{suffix}", content, language_key="lang")
        assert items == DOCUMENTS


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_parquet_text_may_have_any_arrow_string_type(tmp_path, kind):
    column = pyarrow.array([row["text"] for row in ROWS])
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    parquet.write_table(pyarrow.table({"text": column, "n": [1, 2, 3]}), tmp_path / "t.parquet")
    items = read(SourceConfig(paths=str(tmp_path / "t.parquet")))
    assert texts(items) == [row["text"] for row in ROWS]
    assert [item.id for item in items] == ["t.parquet[0]", "t.parquet[1]", "t.parquet[2]"]


def test_an_explicit_format_overrides_the_suffix(tmp_path):
    items = read_content(tmp_path, "part-0001", json_lines(ROWS), format="jsonl")
    assert [item.id for item in items] == ["a", "b", "c"]


# splits


LINE_TEXTS = st.lists(
    st.none() | st.text('a 茶𝄞\r\n\\"é', min_size=1, max_size=12).map("x".__add__)
)


@settings(max_examples=150, deadline=None)
@given(LINE_TEXTS, st.sampled_from(["\n", "\r\n"]), st.integers(1, 120), st.booleans())
@example(["x"], "\n", 1, False)
def test_splits_of_json_lines_give_the_same_documents_in_order(
    tmp_path_factory, lines, line_break, split_bytes, ends
):
    rows = ["" if t is None else json.dumps({"text": t}, ensure_ascii=False) for t in lines]
    content = line_break.join(rows) + (line_break if ends else "")
    path = tmp_path_factory.getbasetemp() / "f.jsonl"
    path.write_bytes(content.encode())
    items = read(SourceConfig(paths=str(path)), split_bytes=split_bytes)
    expected = [(f"f.jsonl:{i}", text) for i, text in enumerate(lines, 1) if text is not None]
    assert [(item.id, item.text) for item in items] == expected


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text("ab\n|茶𝄞", max_size=10), max_size=12),
    st.sampled_from(["\n\n", "||", "a|a", "<|endoftext|>", "茶", "\n茶\n"]),
    st.integers(1, 60),
    st.booleans(),
)
@example(["x|||y", "z"], "||", 1, False)
@example(["xa|a|ab", "z"], "a|a", 1, False)
def test_splits_at_a_separator_give_the_same_documents_in_order(
    tmp_path_factory, pieces, separator, split_bytes, windows
):
    text = separator.join(pieces)
    expected = [
        (f"f.txt[{index}]", piece.strip("\n"))
        for index, piece in enumerate(text.split(separator))
        if piece.strip()
    ]
    content = text.replace("\n", "\r\n") if windows else text
    path = tmp_path_factory.getbasetemp() / "f.txt"
    path.write_bytes(content.encode())
    config = SourceConfig(paths=str(path), document_separator=separator)
    items = read(config, split_bytes=split_bytes)
    assert [(item.id, item.text.replace("\r", "")) for item in items] == expected


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), st.integers(1, 20), st.sampled_from(["a", "ab", "aba", "\n\n"]))
def test_records_do_not_depend_on_block_boundaries(content, size, delimiter):
    content = content + b"ababa" + content
    delimiter = Delimiter.from_text(delimiter)
    pieces = [content[i : i + size] for i in range(0, len(content), size)]
    expected = delimiter.pattern.split(content)
    assert list(split_records(pieces, delimiter)) == expected[: None if expected[-1] else -1]


@pytest.mark.parametrize("split_bytes", [1, 100, 1000, 10_000, 1 << 26])
def test_splits_of_text_lines_and_of_row_groups_give_the_same_documents(tmp_path, split_bytes):
    lines = [f"{i} " + "茶" * (i % 40) for i in range(300)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    table = [{"text": line} for line in lines]
    (tmp_path / "b.parquet").write_bytes(parquet_bytes(table, row_group_size=7))
    config = SourceConfig(paths=str(tmp_path / "*"), documents="line")
    items = read(config, split_bytes=split_bytes)
    assert texts(items) == [*lines, *lines]
    assert [item.id for item in items[:300]] == [f"a.txt:{i}" for i in range(1, 301)]
    assert [item.id for item in items[300:]] == [f"b.parquet[{i}]" for i in range(300)]


def test_splits_of_a_large_file_have_about_the_requested_size(tmp_path):
    row = json_lines([{"text": "x" * 989}])
    path = tmp_path / "a.jsonl"
    path.write_bytes(row * 4000)  # 4 MB in lines of 1002 bytes
    splits = list_splits("s", SourceConfig(paths=str(path)), split_bytes=1 << 20)
    sizes = [split.num_bytes for split in splits]
    assert len(splits) == 4
    assert sum(sizes) == path.stat().st_size
    assert all(1 << 20 <= size <= (1 << 20) + blocks.BLOCK_BYTES for size in sizes[:-1])
    assert all(size % len(row) == 0 for size in sizes)


def test_small_files_share_a_split(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i} " * 2000)
    config = SourceConfig(paths=str(tmp_path))
    splits = list_splits("s", config, split_bytes=100_000)
    assert all(split.num_bytes <= 100_000 for split in splits)
    for split, following in itertools.pairwise(splits):
        assert split.num_bytes + following.parts[0].num_bytes > 100_000
    assert [item.id.split("/")[1] for item in read(config, split_bytes=100_000)] == [
        f"{i:02}.txt" for i in range(40)
    ]


def test_tiny_files_are_charged_for_the_cost_of_opening_them(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("tea")
    config = SourceConfig(paths=str(tmp_path))
    splits = list_splits("s", config, split_bytes=5 * OPENING_BYTES)
    assert [len(split.parts) for split in splits] == [5] * 4


def test_row_groups_share_a_split_up_to_the_requested_size(tmp_path):
    rows = [{"text": f"{i:04}" * 100} for i in range(60)]
    path = tmp_path / "f.parquet"
    path.write_bytes(parquet_bytes(rows, row_group_size=5, use_dictionary=False))
    group_bytes = parquet.ParquetFile(path).metadata.row_group(0).total_byte_size
    splits = list_splits("s", SourceConfig(paths=str(path)), split_bytes=3 * group_bytes - 100)
    assert [(s.parts[0].start, s.parts[0].stop, s.parts[0].first) for s in splits] == [
        *[(0, 3, 0), (3, 6, 15), (6, 9, 30), (9, 12, 45)]
    ]


def test_compressed_and_utf_16_files_are_never_split(tmp_path):
    content = json_lines([{"text": "茶" * 50}] * 50)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "b.jsonl").write_bytes(content.decode().encode("utf-16"))
    config = SourceConfig(paths=str(tmp_path))
    assert [len(split.parts) for split in list_splits("s", config, split_bytes=10)] == [1, 1]
    assert len(texts(read(config, split_bytes=10))) == 100


@pytest.mark.parametrize("split_bytes", [0, -1])
def test_a_split_size_of_zero_is_refused(tmp_path, split_bytes):
    with pytest.raises(ConfigError, match="split_bytes"):
        list_splits("s", SourceConfig(paths=str(tmp_path)), split_bytes=split_bytes)


@pytest.mark.parametrize(
    ("name", "package"),
    [("a.parquet", "pyarrow"), ("a.jsonl.zst", "pyarrow"), ("a.html", "resiliparse")],
)
def test_a_missing_package_is_named_with_its_extra_before_any_work(
    tmp_path, monkeypatch, name, package
):
    for module in (package, *sys.modules):
        if module.split(".")[0] == package:
            monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"<p>x")
    with pytest.raises(ConfigError, match=rf"{package}; .*pip install '\.\[data\]'"):
        list_splits("s", SourceConfig(paths=str(tmp_path)))


# ids and languages


@pytest.mark.parametrize(
    ("values", "id"),
    [
        ({"id": "x"}, "x"),
        ({"id": 7}, "7"),
        ({"id": 0}, "0"),
        ({"id": None}, "f.jsonl:2"),
        ({"id": ""}, "f.jsonl:2"),
        ({"id": True}, "f.jsonl:2"),
        ({"id": 1.5}, "f.jsonl:2"),
        ({"id": ["x"]}, "f.jsonl:2"),
        ({}, "f.jsonl:2"),
    ],
)
def test_an_id_is_the_rows_own_or_its_location(tmp_path, values, id):
    content = b"\n" + json_lines([{"text": "t"} | values])
    (item,) = read_content(tmp_path, "f.jsonl", content)
    assert item.id == id


def test_a_configured_id_key_must_exist(tmp_path):
    content = json_lines([{"key": "k", "text": "t"}, {"text": "t"}, {"key": None, "text": "t"}])
    first, *others = read_content(tmp_path, "f.jsonl", content, id_key="key")
    assert first.id == "k"
    assert [(item.location, item.reason) for item in others] == [
        ("f.jsonl:2", "no key 'key' (keys: text)"),
        ("f.jsonl:3", "'key' is of type NoneType"),
    ]


def test_a_documents_language_is_its_own_or_that_of_the_source(tmp_path):
    values = ["en", "EN-us", "zh_Hans_CN", "english", "", None, 3, "cmn"]
    content = json_lines([{"text": "t", "lang": value} for value in values])
    items = read_content(tmp_path, "f.jsonl", content, language_key="lang", language="de")
    assert [item.language for item in items] == ["en", "en", "zh", *["de"] * 4, "cmn"]
    assert read_content(tmp_path, "f.jsonl", content)[0].language is None


def test_text_and_id_keys_are_configurable_in_every_row_format(tmp_path):
    rows = [{"key": 5, "body": "one"}, {"key": 6, "body": "two"}]
    contents = {
        "f.jsonl": json_lines(rows),
        "f.json": json.dumps(rows).encode(),
        "f.csv": csv_bytes(rows),
        "f.parquet": parquet_bytes(rows),
    }
    for name, content in contents.items():
        items = read_content(tmp_path, name, content, text_key="body", id_key="key")
        assert [(item.id, item.text) for item in items] == [("5", "one"), ("6", "two")]


def test_the_line_delimiter_is_one_byte():
    assert LINE.pattern.pattern == b"\n"
    assert LINE.max_bytes >= 1
