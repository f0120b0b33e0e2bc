"""An unwritable output path is a user error: one sentence, exit code 2, and nothing left over."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from easyllm.adapters import LoRAConfig, attach, save_adapter
from easyllm.core import atomic
from easyllm.core.errors import OutputError
from easyllm.models import hf_module_name, load_model
from easyllm_command import easyllm

PROC = pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_folder):
    """Input files of the commands."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (folder / "text.txt").write_text("one two three four five 你好，世界\n" * 40)
    (folder / "train.yaml").write_text(
        f"model: {tiny_folder}\ndata: {{ train: [rows.jsonl], max_seq_len: 64 }}\nmax_steps: 1\n"
    )
    (folder / "run.yaml").write_text(
        f"name: r\noutput: x\nstages: {{ copy: {{ kind: convert, model: {tiny_folder} }} }}\n"
    )
    (folder / "corpus.yaml").write_text(
        f"name: c\ntokenizer: {tiny_folder}\nsources: {{ a: {{ paths: [text.txt], documents: "
        f"line }} }}\n"
    )
    model = load_model(tiny_folder)
    attach(model, LoRAConfig(rank=2))
    save_adapter(
        model,
        folder / "adapter",
        module_name=hf_module_name(model),
        base=str(tiny_folder),
    )
    return folder


def commands(folder, model, target):
    """Returns every command that writes a folder, with `target` as its output."""
    return {
        "convert": ("convert", model, target),
        "merge": ("merge", model, folder / "adapter", target),
        "train": ("train", folder / "train.yaml", f"output={target}"),
        "train --dry-run": ("train", folder / "train.yaml", f"output={target}", "--dry-run"),
        "run": ("run", folder / "run.yaml", f"output={target}"),
        "run --dry-run": ("run", folder / "run.yaml", f"output={target}", "--dry-run"),
        "data build": ("data", "build", folder / "corpus.yaml", f"output={target}"),
        "tokenizer train": (
            *("tokenizer", "train", folder / "text.txt"),
            *("--output", target, "--vocab-size", 300),
        ),
        "tokenizer extend": (
            *("tokenizer", "extend", model, folder / "text.txt"),
            *("--output", target, "--new", 1),
        ),
    }


NAMES = tuple(commands(Path(), Path(), Path()))


def in_a_system_folder(tmp_path, patch):
    return Path("/proc/easyllm-out")


def deep_in_a_system_folder(tmp_path, patch):
    return Path("/proc/easyllm-out/deep/out")


def through_a_file(tmp_path, patch):
    (tmp_path / "file").touch()
    return tmp_path / "file" / "out"


def name_too_long(tmp_path, patch):
    return tmp_path / ("x" * 300)


def path_too_long(tmp_path, patch):
    return tmp_path.joinpath(*["x" * 200] * 30)


def in_a_circle(tmp_path, patch):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    return tmp_path / "a" / "out"


def refused(number):
    """Simulates that creating folders in `locked` fails with errno `number` (root could write)."""

    def make(tmp_path, patch):
        mkdir = Path.mkdir

        def refuse(self, *args, **options):
            if "locked" in self.parts:
                raise OSError(number, os.strerror(number), str(self))
            mkdir(self, *args, **options)

        (tmp_path / "locked").mkdir()
        patch.setattr(Path, "mkdir", refuse)
        return tmp_path / "locked" / "out"

    return make


KINDS = {
    "a folder that cannot be made": (in_a_system_folder, "cannot be created there"),
    "deep in one": (deep_in_a_system_folder, "cannot be created there"),
    "through a file": (through_a_file, "is a file, not a folder"),
    "a name too long": (name_too_long, "too long"),
    "a path too long": (path_too_long, "too long"),
    "links in a circle": (in_a_circle, "loop of symbolic links|is a file, not a folder"),
    "no permission": (refused(errno.EACCES), "permission denied"),
    "a read-only file system": (refused(errno.EROFS), "read-only"),
    "a full disk": (refused(errno.ENOSPC), "no space is left"),
    "a quota": (refused(errno.EDQUOT), "quota"),
}


@PROC
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_an_unwritable_path_is_refused(inputs, tiny_folder, tmp_path, monkeypatch, name, kind):
    make, words = KINDS[kind]
    target = make(tmp_path, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    done = easyllm(*commands(inputs, tiny_folder, target)[name])
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: cannot write "), done.stderr
    assert any(word in last for word in words.split("|")), last
    assert sorted(tmp_path.rglob("*")) == before


LATE = ("convert", "merge", "train", "run", "tokenizer train", "tokenizer extend")


@pytest.mark.parametrize("name", LATE)
def test_a_disk_that_fills_up_while_writing_is_reported(
    inputs, tiny_folder, tmp_path, monkeypatch, name
):
    target = tmp_path / "out"
    words = commands(inputs, tiny_folder, target)[name]

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    done = easyllm(*words)
    assert done.returncode == 2, done.stderr
    assert "no space is left" in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.rglob("*.partial"))
    assert not (target / "config.json").exists()


def limited(words, limit):
    """Runs a command with a file size limit of `limit` bytes, enforced by the operating system."""
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "from easyllm.cli.main import main; main()"
    )
    words = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def test_a_file_size_limit_is_reported(inputs, tiny_folder, tmp_path):
    done = limited(("convert", tiny_folder, tmp_path / "out"), 20_000)
    assert done.returncode == 2, done.stderr
    assert "larger than the system allows" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_is_reported_for_standard_output(tiny_folder):
    words = [sys.executable, "-m", "easyllm", "tokenizer", "encode", str(tiny_folder), "hello"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: cannot write: no space is left on the disk; free some space or choose another "
        "folder"
    )


def test_an_unreadable_input_is_not_reported_as_an_output_error(inputs, monkeypatch):
    read = Path.read_text

    def locked(self, *args, **options):
        if self.name == "train.yaml":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return read(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", locked)
    done = easyllm("train", inputs / "train.yaml", "output=out")
    assert done.returncode == 2
    assert "train.yaml': permission denied; check the path" in done.stderr
    with pytest.raises(FileNotFoundError), atomic.output_errors(inputs / "out" / "file"):
        (inputs.parent / "elsewhere" / "in.txt").read_text()


def test_a_null_byte_in_a_path_is_refused(tmp_path):
    with pytest.raises(OutputError, match="null byte"):
        atomic.check_output_free(tmp_path / "a\0b")
