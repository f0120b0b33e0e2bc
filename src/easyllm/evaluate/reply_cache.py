"""Replies of a judge on disk, by the hash of the request: an interrupted comparison resumes.

One line of JSON per reply, `{"key": sha256, "reply": text}`, appended as soon as it arrives. A line
that was cut off when a process ended is ignored, and its request is sent again.
"""

import hashlib
import json
import threading
from pathlib import Path

from easyllm.core.atomic import output_errors
from easyllm.core.device import cache_folder
from easyllm.core.errors import DataError
from easyllm.core.json_types import JsonMapping


class ReplyCache:
    """The replies in a file; safe to use from several threads.

    Args:
        path: the file, created when the first reply is added; None keeps replies in memory only.
        of: whose replies they are, for the error message, and the option that names the file.

    Raises:
        DataError: the file is not a cache of replies.
    """

    def __init__(
        self, path: Path | None, *, of: tuple[str, str] = ("a judge's", "--judge-cache")
    ) -> None:
        self.path, self._of, self._lock = path, of, threading.Lock()
        self._replies: dict[str, str] = {}
        self._ends_in_line = True
        if path is not None and path.exists():
            self._read(path)

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> str | None:
        """Returns the reply with a key, if there is one."""
        return self._replies.get(key)

    def add(self, key: str, reply: str) -> None:
        """Adds a reply, and writes it to the file.

        Raises:
            OutputError: the file cannot be written.
        """
        with self._lock:
            self._replies[key] = reply
            if self.path is None:
                return
            line = json.dumps({"key": key, "reply": reply}) + "\n"
            with output_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line if self._ends_in_line else f"\n{line}")
            self._ends_in_line = True

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = text.split("\n")
        self._ends_in_line = not lines[-1]
        found = 0
        for line in lines:
            try:
                value = json.loads(line)
                self._replies[str(value["key"])] = str(value["reply"])
                found += 1
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        if text.strip() and not found and len(lines) > 1:
            raise DataError(
                f"{str(path)!r} is not a cache of {self._of[0]} replies; name another file, or a "
                f"new one, with {self._of[1]}"
            )


def default_cache(url: str) -> Path:
    """Returns the file of the replies of the judge at an address, in Easyllm's cache folder.

    Args:
        url: the address, as `JudgeClient.url`.
    """
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return cache_folder() / "judge" / f"{name}.jsonl"


def request_key(values: JsonMapping) -> str:
    """Returns the hash of a request: of everything that its reply depends on."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


__all__ = ["ReplyCache", "default_cache", "request_key"]
