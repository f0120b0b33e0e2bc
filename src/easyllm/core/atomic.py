"""Writing files and folders so that a reader sees the old content or the new, never a half."""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from easyllm.core.errors import OutputError


@contextmanager
def atomic_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends well.

    On any error the temporary folder is removed and `target` is as it was.

    Raises:
        OutputError: `target` exists (and `replace` is false), or the disk is full.
    """
    target = Path(target)
    if not replace:
        refuse_existing(target)
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
        work.mkdir()
    try:
        with output_errors(target):
            yield work
            for path in work.rglob("*"):
                if path.is_file():
                    _sync(path)
            _publish(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def refuse_existing(target: Path) -> None:
    """Refuses an output folder that holds something (before any work is done for it).

    Raises:
        OutputError: it does.
    """
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise OutputError(
            f"output {str(target)!r} already holds something; choose another folder or remove it"
        )


def write_atomic(target: Path, content: str | bytes) -> None:
    """Writes `content` to `target` in one step (write aside, fsync, rename)."""
    target = Path(target)
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    with output_errors(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            data = content.encode("utf-8") if isinstance(content, str) else content
            with work.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(work, target)
        except BaseException:
            with suppress(OSError):
                work.unlink()
            raise


def write_json(target: Path, value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON in one step."""
    write_atomic(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Turns the operating system's refusals to write into an `OutputError` that says what to do."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        if reason is None:
            raise
        raise OutputError(f"cannot write {str(target)!r}: {reason}") from error
    except Exception as error:
        # safetensors reports the operating system's errors as text of its own exception type
        if "No space left" in str(error) and not isinstance(error, OutputError):
            raise OutputError(f"cannot write {str(target)!r}: {_REASONS[errno.ENOSPC]}") from error
        raise


_REASONS = {
    errno.ENOSPC: "no space is left on the disk; free some or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another folder",
    errno.EEXIST: "a part of the path is a file, not a folder; choose another folder",
}


def _publish(work: Path, target: Path) -> None:
    old = None
    if target.exists():
        old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
        os.rename(target, old)
    try:
        os.rename(work, target)
    except BaseException:
        if old is not None:
            os.rename(old, target)
        raise
    _sync(target.parent)
    if old is not None and old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    elif old is not None:
        old.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
