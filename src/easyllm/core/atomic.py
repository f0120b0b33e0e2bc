"""Writing files and folders so that a reader sees the old content or the new, never a half."""

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from easyllm.core.errors import EasyllmError, OutputError


@contextmanager
def atomic_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder next to `target` that takes its name when the block ends well.

    On any error the temporary folder is removed and `target` is as it was.

    Raises:
        OutputError: `target` exists (and `replace` is false), or the operating system refuses to write there.
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
    """Refuses an output folder that holds something or cannot be written (before any work is done for it).

    Raises:
        OutputError: it does, or it cannot.
    """
    with output_errors(target):
        if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
            raise OutputError(
                f"output {str(target)!r} already holds something; choose another folder or remove it"
            )
    refuse_unwritable(target)


def refuse_unwritable(target: Path) -> None:
    """Refuses an output that could not be made, by making (and removing) an empty folder in the nearest folder there is.

    Raises:
        OutputError: the operating system refuses; what it says becomes the reason.
    """
    with output_errors(target):
        if "\0" in str(target):
            raise ValueError("embedded null byte")
        if len(os.fsencode(target.name)) > MAX_NAME_BYTES:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        folder = target.absolute()
        while not os.path.lexists(folder):  # which finds a link that leads nowhere, too
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        probe = folder / f".{uuid.uuid4().hex}.partial"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:  # the target is to blame, not the probe
            raise OSError(error.errno, error.strerror) from None


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
    """Turns the operating system's refusals to write into an `OutputError` that says what to do.

    An error that names a file elsewhere (an input that cannot be read, say) passes through.
    """
    try:
        yield
    except EasyllmError:
        raise
    except Exception as error:
        reason = write_refusal(error)
        if reason is None or not _concerns(target, error):
            raise
        raise OutputError(f"cannot write {str(target)!r}: {reason}") from error


def write_refusal(error: BaseException) -> str | None:
    """Why the operating system refuses to write, and what to do; None for an error that is no such refusal.

    safetensors and tokenizers report the system's errors as text of exceptions of their own: "... (os error 28)".
    """
    if isinstance(error, OSError):
        short = "requested and" in str(error) and "written" in str(
            error
        )  # NumPy's, without a number
        return _REASONS.get(errno.ENOSPC if short else error.errno or 0)
    if isinstance(error, ValueError) and "null byte" in str(error):
        return "the path holds a null byte; choose another name"
    told = re.search(r"\(os error (\d+)\)", str(error))
    return _REASONS.get(int(told[1])) if told else None


def os_error_sentence(error: OSError) -> str | None:
    """What a person is told of an error of the operating system that nothing else has explained; None for one that no
    path, disk or permission explains."""
    named = f" {os.fsdecode(error.filename)!r}" if isinstance(error.filename, str | bytes) else ""
    if named and error.errno in _OF_THE_PATH:
        reason = os.strerror(error.errno or 0).lower()
        return f"cannot use{named}: {reason}; check the path and its permissions"
    refusal = write_refusal(error)
    return None if refusal is None else f"cannot write{named}: {refusal}"


def _concerns(target: Path, error: Exception) -> bool:
    """Whether an error that names a file names one that is written for `target`, or a folder above it."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str | bytes):
        return True
    named, goal = Path(os.fsdecode(name)).absolute(), target.absolute()
    return named.is_relative_to(goal.parent) or goal.is_relative_to(named)


MAX_NAME_BYTES = 255 - len("..12345678.partial")
"""Of an output's name: file systems take 255, and what is written aside first has a longer one."""
_REASONS = {
    errno.ENOSPC: "no space is left on the disk; free some or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file would be larger than the system allows; raise the limit or choose another folder",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "the operation is not permitted there; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another folder",
    errno.EEXIST: "a part of the path is a file, not a folder; choose another folder",
    errno.EISDIR: "it is a folder, and a file is to be written; choose another name",
    errno.ENOTEMPTY: "something else has written there meanwhile; choose another folder",
    errno.ENOENT: "the folder cannot be made there; choose another folder",
    errno.ENAMETOOLONG: "the path is too long; choose a shorter one",
    errno.ELOOP: "its links lead back to themselves; choose another folder",
    errno.EINVAL: "the file system does not take this name; choose another one",
    errno.ENXIO: "no such device; choose another folder",
    errno.EBUSY: "another program holds it; choose another folder",
    errno.EIO: "the disk reports an input/output error; choose another folder",
    errno.EMLINK: "the folder holds too many others; choose another folder",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine; close some",
    errno.ESTALE: "the network file system has lost it; choose another folder",
}


_OF_THE_PATH = frozenset(
    {
        *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR),
        *(errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
    }
)
"""What is wrong with a path itself, whether it is read or written."""


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
