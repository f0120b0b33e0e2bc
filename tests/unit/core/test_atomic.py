"""Atomic writes: complete or absent, nothing existing is overwritten, and errors say what to do."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from easyllm.core import atomic
from easyllm.core.atomic import atomic_directory, output_errors, write_atomic, write_json
from easyllm.core.errors import OutputError
from easyllm.models import load_model, save_model


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(target: Path, content: str, *, replace: bool = False, fail: BaseException | None = None):
    with atomic_directory(target, replace=replace) as work:
        (work / "sub").mkdir()
        (work / "sub" / "file").write_text(content)
        if fail is not None:
            raise fail


def test_a_folder_appears_under_its_name_with_its_complete_content(tmp_path):
    fill(tmp_path / "deep" / "out", "new")
    assert (tmp_path / "deep" / "out" / "sub" / "file").read_text() == "new"
    assert names(tmp_path / "deep") == ["out"]


def test_the_name_does_not_exist_before_the_block_ends(tmp_path):
    with atomic_directory(tmp_path / "out") as work:
        (work / "file").touch()
        assert not (tmp_path / "out").exists()
        assert work.parent == tmp_path


def test_an_existing_non_empty_folder_is_refused_before_any_work(tmp_path):
    fill(tmp_path / "out", "old")
    entered = False
    with (
        pytest.raises(OutputError, match=r"out' already exists and is not empty"),
        atomic_directory(tmp_path / "out"),
    ):
        entered = True
    assert not entered
    assert (tmp_path / "out" / "sub" / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_an_existing_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("old")
    with pytest.raises(OutputError, match="already exists and is not empty"):
        fill(tmp_path / "out", "new")
    assert (tmp_path / "out").read_text() == "old"


def test_an_existing_empty_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "new")
    assert (tmp_path / "out" / "sub" / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_an_exception_in_the_block_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        fill(tmp_path / "out", "new", fail=error)
    assert names(tmp_path) == []


def test_an_exception_in_the_block_leaves_the_old_folder_intact(tmp_path):
    fill(tmp_path / "out", "old")
    with pytest.raises(RuntimeError):
        fill(tmp_path / "out", "new", replace=True, fail=RuntimeError())
    assert (tmp_path / "out" / "sub" / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_replacing_swaps_the_whole_folder(tmp_path):
    fill(tmp_path / "out", "old")
    (tmp_path / "out" / "only-old").touch()
    fill(tmp_path / "out", "new", replace=True)
    assert names(tmp_path / "out") == ["sub"]
    assert (tmp_path / "out" / "sub" / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_replacing_a_file_works(tmp_path):
    (tmp_path / "out").write_text("old")
    fill(tmp_path / "out", "new", replace=True)
    assert (tmp_path / "out" / "sub" / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_replacing_a_link_leaves_the_folder_it_pointed_to(tmp_path):
    fill(tmp_path / "real", "old")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    fill(tmp_path / "out", "new", replace=True)
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "sub" / "file").read_text() == "old"
    assert names(tmp_path) == ["out", "real"]


def test_a_swap_that_fails_halfway_restores_the_old_folder(tmp_path, monkeypatch):
    fill(tmp_path / "out", "old")
    rename = os.rename

    def refuse_the_second(source, target):
        if str(source).endswith(".partial"):
            raise OSError(errno.EACCES, "no")
        rename(source, target)

    monkeypatch.setattr(atomic.os, "rename", refuse_the_second)
    with pytest.raises(OutputError, match="permission denied"):
        fill(tmp_path / "out", "new", replace=True)
    assert (tmp_path / "out" / "sub" / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_path_through_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file, not a folder"):
        fill(tmp_path / "file" / "out", "new")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        fill(tmp_path / "file" / "deep" / "out", "new")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        write_atomic(tmp_path / "file" / "x.json", "new")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "no space is left"),
        (errno.EDQUOT, "quota is used up"),
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "read-only"),
    ],
)
def test_errors_of_the_operating_system_say_what_to_do(tmp_path, code, words):
    with pytest.raises(OutputError, match=f"cannot write .*out'.*{words}"):
        fill(tmp_path / "out", "new", fail=OSError(code, os.strerror(code)))
    assert names(tmp_path) == []


def test_other_errors_pass_through():
    with pytest.raises(OSError, match="Interrupted"), output_errors(Path("out")):
        raise OSError(errno.EINTR, "Interrupted")
    with pytest.raises(ZeroDivisionError), output_errors(Path("out")):
        raise ZeroDivisionError


def test_a_full_disk_reported_as_text_is_an_output_error():
    with pytest.raises(OutputError, match="no space is left"), output_errors(Path("out")):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["write_model_weights", "write_json"])
def test_a_disk_that_fills_up_while_saving_a_model_leaves_nothing(
    tmp_path, monkeypatch, tiny_model, step
):
    monkeypatch.setattr(f"easyllm.models.save.{step}", full_disk)
    with pytest.raises(OutputError, match="no space is left on the disk"):
        save_model(tiny_model, tmp_path / "model")
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_halfway_leaves_the_old_model(tmp_path, monkeypatch, tiny_model):
    target = save_model(tiny_model, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    written = []

    def second_time(path, value):
        if written:
            full_disk()
        written.append(path)
        write_json(path, value)

    monkeypatch.setattr("easyllm.models.save.write_json", second_time)
    with pytest.raises(OutputError, match="space"):
        save_model(tiny_model, target, replace=True)
    assert written
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert names(tmp_path) == ["model"]


def test_overwriting_a_model_must_be_explicit(tmp_path, tiny_model):
    target = save_model(tiny_model, tmp_path / "model", extra_files={"extra.json": {}})
    with pytest.raises(OutputError, match="already exists and is not empty"):
        save_model(tiny_model, target)
    assert (target / "extra.json").is_file()
    save_model(tiny_model, target, replace=True)
    assert not (target / "extra.json").exists()
    assert load_model(target).config == tiny_model.config


def test_a_file_is_replaced_in_one_step(tmp_path):
    target = tmp_path / "deep" / "file"
    write_atomic(target, "old")
    write_atomic(target, b"new")
    assert target.read_bytes() == b"new"
    assert names(target.parent) == ["file"]


def test_a_file_that_cannot_be_completed_leaves_the_old_one(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write_atomic(target, "old")
    monkeypatch.setattr(atomic.os, "fsync", full_disk)
    with pytest.raises(OutputError, match="no space is left"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_json_is_written_indented_and_in_utf8(tmp_path):
    value = {"a": [1, 2.5, None], "你好": "é"}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "你好" in text
    assert text.endswith("}\n")


def test_weight_files_have_the_permissions_of_the_umask(tmp_path, tiny_model):
    mask = os.umask(0o027)
    try:
        target = save_model(tiny_model, tmp_path / "model")
    finally:
        os.umask(mask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()}
    assert modes == {0o640}
