"""Atomic writes of files and folders: a reader sees the old or the new content, never a mix."""

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from easyllm.core.errors import EasyllmError, OutputError


@contextmanager
def atomic_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder next to `target` and renames it to `target` if the block succeeds.

    On any error the temporary folder is removed and `target` stays unchanged.

    Raises:
        OutputError: `target` is not empty (and `replace` is false), or the operating system does
            not allow writing there.
    """
    target = Path(target)
    if not replace:
        check_output_free(target)
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = _temporary(target)
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


def check_output_free(target: Path) -> None:
    """Checks, before any work is done, that an output folder is empty (or absent) and writable.

    Raises:
        OutputError: `target` is not empty or cannot be written.
    """
    with output_errors(target):
        if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
            raise OutputError(
                f"output {str(target)!r} already exists and is not empty; "
                "choose another name or remove it"
            )
    check_writable(target)


def check_writable(target: Path) -> None:
    """Checks that `target` can be created.

    The check creates (and removes) an empty folder in the nearest existing parent folder.

    Raises:
        OutputError: the operating system does not allow it; the message contains its reason.
    """
    with output_errors(target):
        if "\0" in str(target):
            raise ValueError("embedded null byte")
        if len(os.fsencode(target.name)) > MAX_NAME_BYTES:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        folder = target.absolute()
        while not os.path.lexists(folder):  # also true for a dangling symbolic link
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        probe = folder / f".{uuid.uuid4().hex}.partial"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:  # report the target, not the name of the probe
            raise OSError(error.errno, error.strerror) from None


@contextmanager
def atomic_file(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields the path of a temporary file, renamed to `target` if the block succeeds.

    Raises:
        OutputError: `target` exists (and `replace` is false), or cannot be written.
    """
    target = Path(target)
    if not replace:
        check_output_free(target)
    work = _temporary(target)
    with output_errors(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield work
            _sync(work)
            os.replace(work, target)
        except BaseException:
            with suppress(OSError):
                work.unlink()
            raise


def write_atomic(target: Path, content: str | bytes) -> None:
    """Writes `content` to `target` atomically (write a temporary file, fsync, rename).

    Raises:
        OutputError: the operating system does not allow writing there.
    """
    with atomic_file(target, replace=True) as work:
        work.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(target: Path, value: object) -> None:
    """Writes `value` atomically as indented UTF-8 JSON.

    Raises:
        OutputError: the operating system does not allow writing there.
    """
    write_atomic(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Converts the operating system's write errors into an `OutputError` that says what to do.

    An error that names an unrelated file (such as an unreadable input) is re-raised unchanged.
    """
    try:
        yield
    except EasyllmError:
        raise
    except Exception as error:
        reason = write_error_reason(error)
        if reason is None or not _concerns(target, error):
            raise
        raise OutputError(f"cannot write {str(target)!r}: {reason}") from error


def write_error_reason(error: BaseException) -> str | None:
    """Returns why the operating system refused to write and what to do; None for any other error.

    safetensors and tokenizers raise their own exceptions, which contain the system's error code
    only as text: "... (os error 28)".
    """
    if isinstance(error, OSError):
        # NumPy reports a short write with this text and without an errno
        short = "requested and" in str(error) and "written" in str(error)
        return _REASONS.get(errno.ENOSPC if short else error.errno or 0)
    if isinstance(error, ValueError) and "null byte" in str(error):
        return "the path contains a null byte; choose another name"
    told = re.search(r"\(os error (\d+)\)", str(error))
    return _REASONS.get(int(told[1])) if told else None


def os_error_message(error: OSError) -> str | None:
    """Returns a one-sentence message for an operating system error that no other code handled.

    Returns None if the cause is not a path, a disk or a permission.
    """
    named = f" {os.fsdecode(error.filename)!r}" if isinstance(error.filename, str | bytes) else ""
    if named and error.errno in _OF_THE_PATH:
        reason = os.strerror(error.errno or 0).lower()
        return f"cannot use{named}: {reason}; check the path and its permissions"
    refusal = write_error_reason(error)
    return None if refusal is None else f"cannot write{named}: {refusal}"


def _concerns(target: Path, error: Exception) -> bool:
    """Whether the file that an error names, if any, belongs to `target` or is a folder above it."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str | bytes):
        return True
    named, goal = Path(os.fsdecode(name)).absolute(), target.absolute()
    return named.is_relative_to(goal.parent) or goal.is_relative_to(named)


MAX_NAME_BYTES = 255 - len("..12345678.partial")
"""Longest name of an output: file systems allow 255 bytes, and the temporary name is longer."""
_REASONS = {
    errno.ENOSPC: "no space is left on the disk; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file would be larger than the system allows; "
    "raise the limit or choose another folder",
    errno.EACCES: "permission denied; choose a folder that you can write to",
    errno.EPERM: "the operation is not permitted there; choose a folder that you can write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another folder",
    errno.EEXIST: "a part of the path is a file, not a folder; choose another folder",
    errno.EISDIR: "the path is a folder, but a file must be written there; choose another name",
    errno.ENOTEMPTY: "another program has written there in the meantime; choose another folder",
    errno.ENOENT: "the folder cannot be created there; choose another folder",
    errno.ENAMETOOLONG: "the path is too long; choose a shorter one",
    errno.ELOOP: "the path contains a loop of symbolic links; choose another folder",
    errno.EINVAL: "the file system does not accept this name; choose another one",
    errno.ENXIO: "no such device; choose another folder",
    errno.EBUSY: "another program is using it; choose another folder",
    errno.EIO: "the disk reports an input/output error; choose another folder",
    errno.EMLINK: "the folder contains too many subfolders; choose another folder",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine; close some",
    errno.ESTALE: "the network file handle is stale; choose another folder",
}


_OF_THE_PATH = frozenset(
    {
        *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR),
        *(errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
    }
)
"""Errors caused by the path itself, whether it is read or written."""


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


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """Yields a path of the same name in a temporary folder, for a file or folder to be checked.

    What the block has written there is moved to `target` if the block succeeds.

    Raises:
        OutputError: `target` exists and is not empty, or cannot be written.
    """
    target = Path(target)
    check_output_free(target)
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = _temporary(target)
        work.mkdir()
    try:
        yield work / target.name
        with output_errors(target):
            check_output_free(target)  # another program may have written there in the meantime
            if (work / target.name).is_dir():
                _publish(work / target.name, target)
            else:
                os.replace(work / target.name, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _temporary(target: Path) -> Path:
    """Returns an unused path next to `target`."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
