"""Files of a source: folders, globs, names, options."""

import os
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from document_files import read, read_content
from easyllm.core.config import load_config
from easyllm.core.errors import ConfigError, SourceError
from easyllm.core.yaml_text import dump_yaml
from easyllm.corpus.sources import SourceConfig, list_splits

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
