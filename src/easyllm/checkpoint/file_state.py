"""What identifies a file and its contents without reading them."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FileState:
    """A file at one moment; a changed or replaced file has another state.

    Attributes:
        path: the file, without symbolic links.
        inode: its number in the file system.
        size: its size in bytes.
        modified: time of the last change of its contents, in nanoseconds; programs can set it.
        changed: time of the last change of its inode, in nanoseconds; programs cannot set it.
    """

    path: str
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: str | Path) -> "FileState":
        """Returns the present state of a file.

        Raises:
            OSError: it does not exist.
        """
        name = os.path.realpath(path)
        found = os.stat(name)
        return cls(name, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def values(self) -> list[str | int]:
        """Returns all values, in a fixed order."""
        return [self.path, self.inode, self.size, self.modified, self.changed]


__all__ = ["FileState"]
