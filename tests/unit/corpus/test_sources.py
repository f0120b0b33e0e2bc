"""Sources of documents: same documents in all formats, encodings and splits; bad rows named."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import pickle
import random
import re
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from pydantic import ValidationError

from easyllm.core.config import dump_yaml, load_config
from easyllm.core.errors import ConfigError, DataError, SourceError
from easyllm.corpus import extract
from easyllm.corpus.document import Document
from easyllm.corpus.document_fields import EMPTY_TEXT
from easyllm.corpus.extract import decode_page, html_text, markdown_text
from easyllm.corpus.files import blocks
from easyllm.corpus.files.blocks import LINE, Delimiter, split_records
from easyllm.corpus.files.formats import BadRow
from easyllm.corpus.sources import OPENING_BYTES, SourceConfig, Split, list_splits, read_split

RANDOM = random.Random(0)
ROWS = [
    {"id": "a", "text": "Tea is a drink.\nIt is hot.", "lang": "en-GB"},
    {"id": "b", "text": '茶是一种饮料, "热"的。', "lang": "zh_Hans"},
    {"id": "c", "text": "𝄞 Le thé\r\nest chaud. ", "lang": "fr"},
]
DOCUMENTS = [
    Document(id=row["id"], source="s", text=row["text"], language=language)
    for row, language in zip(ROWS, ("en", "zh", "fr"), strict=True)
]


def read(config, *, split_bytes=1 << 26):
    """Reads everything in a source, with its splits sent through JSON and pickle."""
    splits = list_splits("s", config, split_bytes=split_bytes)
    sent = [Split.from_dict(json.loads(json.dumps(split.as_dict()))) for split in splits]
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


# file selection


def names(*paths, **options):
    config = SourceConfig(paths=tuple(map(str, paths)), **options)
    return [part.name for split in list_splits("s", config) for part in split.parts]


@pytest.fixture
def tree(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.txt", "sub/deep/d.txt", ".git/e.txt", "sub/.f.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(name)
    return tmp_path / "data"


def test_a_folder_is_read_to_any_depth_without_hidden_files(tree):
    assert names(tree) == ["data/a.md", "data/b.txt", "data/sub/c.txt", "data/sub/deep/d.txt"]


def test_globs_files_and_folders_can_be_mixed_and_each_file_is_read_once(tree):
    assert names(tree / "*.txt") == ["b.txt"]
    assert names(tree / "**/*.txt") == ["b.txt", "sub/c.txt", "sub/deep/d.txt"]
    assert names(tree / "s*") == ["sub/c.txt", "sub/deep/d.txt"]
    assert names(tree / "b.txt", tree / "*.md") == ["a.md", "b.txt"]
    everything = names(tree / "b.txt", tree, tree / "**" / "*")
    assert everything == ["b.txt", "data/a.md", "data/sub/c.txt", "data/sub/deep/d.txt"]


def test_names_do_not_depend_on_the_location_of_the_data(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert names("sub") == names(tree / "sub") == ["sub/c.txt", "sub/deep/d.txt"]
    assert names(".") == ["a.md", "b.txt", "sub/c.txt", "sub/deep/d.txt"]
    monkeypatch.setenv("HOME", str(tree))
    assert names("~/sub") == names("sub")


def test_names_that_would_be_equal_are_disambiguated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("en/wiki", "zh/wiki"):
        Path(folder).mkdir(parents=True)
        Path(folder, "a.txt").write_text(folder)
    items = read(SourceConfig(paths=("zh/wiki", "en/wiki")))
    assert [(item.id, item.text) for item in items] == [
        ("en/wiki/a.txt", "en/wiki"),
        ("zh/wiki/a.txt", "zh/wiki"),
    ]


def test_a_file_whose_name_looks_like_a_glob_is_read(tmp_path):
    (tmp_path / "a[1].txt").write_text("one")
    (tmp_path / "a1.txt").write_text("other")
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]


def test_links_to_folders_are_followed_once(tree, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "z.txt").write_text("z")
    (tree / "far").symlink_to(tmp_path / "far")
    (tree / "sub" / "loop").symlink_to(tree)
    (tree / "broken.txt").symlink_to(tmp_path / "nowhere")
    assert names(tree / "sub", tree / "far") == [
        *["far/z.txt", "sub/c.txt", "sub/deep/d.txt"],
        *["sub/loop/a.md", "sub/loop/b.txt", "sub/loop/far/z.txt"],
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no names that are no text")
def test_a_file_name_that_is_not_valid_text_is_converted(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("x")
    (item,) = read(SourceConfig(paths=str(tmp_path)))
    assert item.id.endswith("\\udcff.txt")
    item.id.encode()


def test_files_with_other_suffixes_in_a_folder_are_skipped_and_reported(tree, caplog):
    (tree / "picture.png").write_bytes(b"\x89PNG")
    (tree / "LICENSE").write_text("free")
    assert len(names(tree)) == 4
    assert ".png (1)" in caplog.text
    assert "none (1)" in caplog.text
    assert names(tree, format="markdown") == ["data/a.md"]


def test_an_unreadable_folder_is_refused(tree, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(SourceError, match=r"cannot read folder '.*deep': Permission denied"):
        names(tree)


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        (["nowhere.jsonl"], {}, r"'.*nowhere\.jsonl' matches no file"),
        (["sub", "*.jsonl"], {}, r"'.*\*\.jsonl' matches no file"),
        (["empty"], {}, "folder without files"),
        (["odd"], {}, r"contains no file with a suffix of \.txt, .*only \.png \(1\)"),
        (["sub"], {"format": "csv"}, r"suffix of \.csv, \.tsv, only \.txt \(2\); .* set format"),
        (["odd/*"], {}, r"picture\.png' by its suffix .*set format"),
        (["packed/t.parquet.gz"], {}, "decompress it"),
    ],
)
def test_a_path_without_data_is_refused(tree, paths, options, message):
    (tree / "empty").mkdir()
    (tree / "odd").mkdir()
    (tree / "odd" / "picture.png").write_bytes(b"")
    (tree / "packed").mkdir()
    (tree / "packed" / "t.parquet.gz").write_bytes(b"")
    with pytest.raises(SourceError, match=message):
        names(*(tree / path for path in paths), **options)


# configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": ()}, "at least 1"),
        ({"paths": ("a", "")}, "empty path"),
        ({"documents": "line", "document_separator": "x"}, "mutually exclusive"),
        ({"document_separator": ""}, "at least 1"),
        ({"format": "csv", "documents": "line"}, "for text, not csv"),
        ({"format": "html", "text_key": "body"}, "for rows, not html"),
        ({"format": "text", "id_key": "id"}, "for rows, not text"),
        ({"language": "english"}, "pattern"),
        ({"split_paragraphs": True}, "extra"),
    ],
)
def test_an_option_without_effect_is_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        SourceConfig(**{"paths": "data"} | options)


def test_a_configuration_loads_back_equal(tmp_path):
    for format in ("auto", "text", "csv"):
        config = SourceConfig(paths="data", format=format, language="zh")
        (tmp_path / "source.yaml").write_text(dump_yaml(config))
        assert load_config(SourceConfig, tmp_path / "source.yaml") == config


def test_lines_as_documents_need_a_text_file(tmp_path):
    with pytest.raises(ConfigError, match="for text files, but it has no text files"):
        read_content(tmp_path, "a.jsonl", b"", documents="line")


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


# HTML pages

PAGE = """<!doctype html><html><head><title>Tea | Site</title><meta \
charset={}><script>x()</script></head>
<body><nav><a href="/">Home</a> <a href="/b">Blog</a></nav>
<main><div><article><h1>关于茶</h1><p>茶是一种用茶叶和热水做成的饮料。</p>
<ol><li>green</li><li>black</li></ol><pre>a
  b</pre><img src="t.png" alt="a picture"></article></div></main>
<footer>Copyright, Privacy, Contact</footer></body></html>"""
PAGE_TEXT = "关于茶\n\n茶是一种用茶叶和热水做成的饮料。\n\n  1. green\n  2. black\na\n  b"


@pytest.mark.parametrize(
    ("declared", "encoding"),
    [
        ("utf-8", "utf-8"),
        ("utf-8", "utf-8-sig"),
        ("utf-8", "utf-16"),
        ("gb2312", "gb18030"),
        ("gb2312", "utf-8"),
        ("utf-16", "utf-8"),
        ("", "utf-8"),
    ],
)
def test_the_main_text_of_a_page_is_read_in_its_encoding(tmp_path, declared, encoding):
    (item,) = read_content(tmp_path, "tea.html", PAGE.format(declared).encode(encoding))
    assert item == Document(id="tea.html", source="s", text=PAGE_TEXT)


def test_pages_are_decoded_like_in_browsers():
    page = "<meta charset={}><p>{}"
    for declared, encoding, text in (
        ("gb2312", "gb18030", "𠀀 rare"),
        ("big5", "big5hkscs", "㗎"),
        ("shift_jis", "cp932", "①"),
        ("euc-kr", "cp949", "똠"),
        ("iso-8859-1", "cp1252", "“quoted”"),
        ("iso-2022-jp", "iso2022_jp", "お茶"),
        ("koi8-r", "koi8-r", "чай"),
    ):
        assert decode_page(page.format(declared, text).encode(encoding)).endswith(text)


def test_an_invalid_byte_does_not_lose_the_page():
    page = PAGE.format("utf-8").encode()
    broken = page.replace("饮".encode(), "饮".encode()[:2])
    assert html_text(broken) == PAGE_TEXT.replace("饮", "\ufffd")
    guessed = PAGE.format("gb2312").encode("gb18030").replace(b"<p>", b"<p>\xff")
    assert html_text(guessed) == PAGE_TEXT.replace("茶是", "\ufffd茶是")


def test_a_page_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(extract, "MAX_PAGE_BYTES", 100)
    assert html_text(b"<p>" + b"x" * 97) == "x" * 97
    with pytest.raises(DataError, match="101 bytes, more than the maximum of 100"):
        html_text(b"<p>" + b"x" * 98)


def test_blocks_may_be_nested_as_deeply_as_in_browsers():
    assert html_text(b"<div>" * 511 + b"<p>x" + b"</div>" * 511) == "x"
    assert html_text(b"<div></div><p><b>x</b></p>" * 3000).split() == ["x"] * 3000
    for page in (b"<div>" * 600 + b"x", b"<DIV><article>" * 300 + b"x"):
        with pytest.raises(DataError, match="deeper"):
            html_text(page)


# Markdown


@pytest.mark.parametrize(
    ("markdown", "text"),
    [
        ("# Tea\n\ntext\n", "# Tea\n\ntext\n"),
        ("---\ntitle: Tea\ntags:\n  - a\n- b\n\n# c\n---\n# Tea\n", "# Tea\n"),
        ("---\r\ntitle: Tea\r\n---\r\n# Tea\r\n", "# Tea\r\n"),
        ("---\ntitle: Tea\n...\n# Tea\n", "# Tea\n"),
        ("---\ntitle: Tea\n---", ""),
        ("---\n\nA line above.\n\n---\n", "---\n\nA line above.\n\n---\n"),
        (
            "---\nNote: this is prose\nthat goes on.\n---\nx",
            "---\nNote: this is prose\nthat goes on.\n---\nx",
        ),
        ("---\ntitle: never closed\n# Tea\n", "---\ntitle: never closed\n# Tea\n"),
        ("text\n---\na: b\n---\n", "text\n---\na: b\n---\n"),
        ("a <!-- x --> b", "a  b"),
        ("a <!-- x\ny\n--> b\nc <!--z-->", "a  b\nc "),
        ("<!-- a --><!-- b -->c", "c"),
        ("a <!-- open\nb", "a <!-- open\nb"),
        ("a --> b <!-- open", "a --> b <!-- open"),
        ("<!-->\nb -->c", "c"),
        ("a <!--> b", "a <!--> b"),
        ("```\n``` html\n<!-- kept -->\n```\n", "```\n``` html\n<!-- kept -->\n```\n"),
        ("```html\n<!-- kept -->\n```\n<!-- cut -->d", "```html\n<!-- kept -->\n```\nd"),
        ("~~~\n```\n<!-- kept -->\n~~~\n<!-- cut -->", "~~~\n```\n<!-- kept -->\n~~~\n"),
        ("````\n```\n<!-- kept -->\n````\n<!-- cut -->", "````\n```\n<!-- kept -->\n````\n"),
        (
            "- item\n    ```\n    <!-- kept -->\n    ```\n",
            "- item\n    ```\n    <!-- kept -->\n    ```\n",
        ),
        ("```\n<!-- never closed -->", "```\n<!-- never closed -->"),
        ("use `<!-- kept -->` <!-- cut -->", "use `<!-- kept -->` "),
        ("use ``a ` <!-- kept -->`` c", "use ``a ` <!-- kept -->`` c"),
        ("```x``` <!-- cut --> b", "```x```  b"),
    ],
)
def test_markdown_keeps_text_and_code_but_not_front_matter_and_comments(markdown, text):
    assert markdown_text(markdown) == text


def test_markdown_without_comments_is_unchanged():
    @settings(max_examples=100, deadline=None)
    @given(st.text("a`~<!->\n ", max_size=60))
    def check(text):
        result = markdown_text(text)
        assert len(result) <= len(text)
        if "-->" not in text or "<!--" not in text:
            assert result == text

    check()


def test_the_line_delimiter_is_one_byte():
    assert LINE.pattern.pattern == b"\n"
    assert LINE.max_bytes >= 1
