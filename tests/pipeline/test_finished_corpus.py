"""`data build` on a finished corpus checks its files and those of its sources."""

import os
import shutil

import pytest
import yaml

from easyllm_command import easyllm


@pytest.fixture(scope="module")
def built(tiny_folder, tmp_path_factory):
    """A folder with sources, a recipe and the finished corpus."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "texts").mkdir()
    for name in "abc":
        (folder / "texts" / f"{name}.txt").write_text(f"A text named {name}.\n" * 20)
    (folder / "exam.jsonl").write_text('{"text": "' + "one two three four five " * 5 + '"}\n')
    values = {
        "name": "c",
        "output": str(folder / "corpus"),
        "tokenizer": str(tiny_folder),
        "clean": None,
        "dedup": None,
        "workers": 1,
        "sources": {"a": {"paths": str(folder / "texts")}},
        "decontaminate": {"sets": {"exam": {"paths": str(folder / "exam.jsonl")}}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    done = easyllm("data", "build", folder / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def again(built):
    """Builds again after a change, and restores everything afterwards."""
    kept = built.with_name("kept")
    shutil.copytree(built, kept, dirs_exist_ok=True)
    yield lambda: easyllm("data", "build", built / "recipe.yaml")
    shutil.rmtree(built)
    shutil.move(kept, built)


def refused(done, *words):
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()[-1:]) == 1
    for word in (*words, "to build it again, or choose another folder"):
        assert word in done.stderr, done.stderr


def test_a_finished_corpus_is_up_to_date(again):
    done = again()
    assert done.returncode == 0
    assert "already contains this corpus" in done.stderr


@pytest.mark.parametrize("name", ["tokens-00000.bin", "offsets-00000.npy", "manifest.json"])
def test_a_missing_file_of_the_corpus_is_named(built, again, name):
    (built / "corpus" / "shards" / name).unlink()
    refused(again(), "is not what its recipe builds")


def test_a_truncated_shard_is_named(built, again):
    path = built / "corpus" / "shards" / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    refused(again(), str(path), "bytes")


def test_a_changed_source_is_named(built, again):
    path = built / "texts" / "b.txt"
    path.write_text(path.read_text() + "More.\n")
    refused(again(), f"source file '{path}' has changed (from")


def test_a_source_changed_without_its_size_is_named(built, again):
    path = built / "texts" / "b.txt"
    path.write_text(path.read_text().replace("named", "maned"))
    refused(again(), f"source file '{path}' has changed since")


def test_added_and_removed_sources_are_named(built, again):
    path = built / "texts" / "d.txt"
    path.write_text("Another text.\n")
    refused(again(), f"source file '{path}' was added")
    path.unlink()
    (built / "texts" / "a.txt").unlink()
    refused(again(), "a.txt' was removed")


def test_a_changed_evaluation_set_is_named(built, again):
    (built / "exam.jsonl").write_text('{"text": "six seven"}\n')
    refused(again(), "exam.jsonl' has changed")


def test_a_touched_or_moved_source_has_not_changed(built, again):
    os.utime(built / "texts" / "a.txt", ns=(1, 1))
    (built / "texts" / "b.txt").rename(built / "texts" / "z.txt")
    assert again().returncode == 0


def test_a_corpus_of_an_older_version_is_compared_by_hashes(built, again):
    (built / "corpus" / "sources.json").unlink()
    assert again().returncode == 0
    (built / "texts" / "a.txt").write_text("Something else.\n")
    refused(again(), "a.txt' has changed since")
