"""A lock on a folder, so that two processes never write to the same run.

The lock is `flock` on a file in the folder. The operating system releases it when the process ends,
however it ends, so that a killed run can be resumed at once.
"""

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from easyllm.core.atomic import output_errors
from easyllm.core.errors import OutputError

LOCK_FILE = ".lock"
logger = logging.getLogger(__name__)
_UNSUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}


@contextmanager
def locked_folder(folder: Path, *, no_locks: int = logging.WARNING) -> Iterator[None]:
    """Holds the lock of a folder, which is created if it does not exist.

    On exit the lock file is removed, and the folder too if it is empty. On a file system without
    locks, this is logged and the folder is not locked.

    Args:
        folder: the folder.
        no_locks: the level at which a file system without locks is logged.

    Raises:
        OutputError: another process holds the lock, or the folder cannot be written.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = _acquire(folder, no_locks)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):  # the folder may have been moved or removed
                (folder / LOCK_FILE).unlink()
            os.close(file)
        with suppress(OSError):  # not empty
            folder.rmdir()


def check_unlocked(folder: Path) -> None:
    """Checks that no process holds the lock of a folder.

    Raises:
        OutputError: one does; the message gives its process id.
    """
    try:
        file = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return
    try:
        _lock(file, folder, logging.WARNING)
    finally:
        os.close(file)


def _acquire(folder: Path, no_locks: int) -> int | None:
    """Returns the descriptor of the locked file; None if the file system has no locks."""
    path = folder / LOCK_FILE
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(file, folder, no_locks):
                os.close(file)
                path.unlink()
                return None
            # its holder may have removed the file between the two calls
            is_current = path.exists() and os.path.samestat(os.fstat(file), path.stat())
        except BaseException:
            os.close(file)
            raise
        if is_current:
            os.truncate(file, 0)
            os.write(file, f"{os.getpid()} {socket.gethostname()}\n".encode())
            return file
        os.close(file)


def _lock(file: int, folder: Path, no_locks: int) -> bool:
    """Locks an open file; returns whether that is possible here.

    Raises:
        OutputError: another process holds the lock.
    """
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"another process is using {str(folder)!r}{_holder(file)}; wait until it has ended, "
            "stop it, or choose another folder with output=..."
        ) from None
    except (ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
            raise
        logger.log(
            no_locks,
            "%s is on a file system without locks; do not start another run in it",
            folder,
        )
        return False
    return True


def _holder(file: int) -> str:
    """Returns the process that holds a lock, in parentheses; empty if it is not known."""
    pid, _, host = os.pread(file, 300, 0).decode("utf-8", "replace").strip().partition(" ")
    if not pid.isdigit():
        return ""
    return f" (pid {pid})" if host in ("", socket.gethostname()) else f" (pid {pid} on {host})"


__all__ = ["LOCK_FILE", "check_unlocked", "locked_folder"]
