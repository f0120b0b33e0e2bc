"""Sampled answers on disk while a long command runs, so that it resumes after an interruption.

Line 1 is {"identity": hash} of everything that the answers depend on; each further line has the
answers to CHUNK prompts, {"start": number of the first, "answers": [[...], ...]}. Chunks are
sampled one after another, each from an empty prefix cache, so an answer has the same bits whether
or not the chunks before it were sampled by the same process. A line that was cut off is dropped.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from easyllm.core.atomic import output_errors, write_atomic
from easyllm.core.errors import OutputError
from easyllm.core.json_types import JsonObject
from easyllm.core.jsonl import json_objects
from easyllm.core.manifest import hash_value

CHUNK = 32
"""Prompts whose answers are sampled together."""

StoredAnswer = tuple[str, tuple[int, ...], bool]
"""Text and tokens of an answer, and whether it reached the maximum length."""


class AnswerStore:
    """The answers in a file.

    Args:
        path: the file; it is created with the first chunk.
        identity: hash of everything that the answers depend on.

    Raises:
        OutputError: the file has answers of another identity, or is another kind of file.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        self._chunks: dict[int, list[list[StoredAnswer]]] = {}
        if path.exists():
            self._read()

    @property
    def num_prompts(self) -> int:
        """Number of prompts whose answers are in the file."""
        return sum(map(len, self._chunks.values()))

    def get(self, start: int) -> list[list[StoredAnswer]] | None:
        """Returns the answers to each prompt of a chunk, if the file has them.

        Args:
            start: number of the chunk's first prompt.
        """
        return self._chunks.get(start)

    def add(self, start: int, answers: Sequence[Sequence[StoredAnswer]]) -> None:
        """Adds the answers to the prompts of a chunk.

        Raises:
            OutputError: the file cannot be written.
        """
        line = json.dumps({"start": start, "answers": answers}) + "\n"
        if not self.path.exists():
            write_atomic(self.path, json.dumps({"identity": self.identity}) + "\n")
        with output_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def remove(self) -> None:
        """Removes the file, once its answers are used."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        data = self.path.read_bytes()
        lines = list(json_objects(data))
        if not lines or lines[0].get("identity") != self.identity:
            raise OutputError(
                f"{str(self.path)!r} has the answers of an interrupted command with other options, "
                "another model or other prompts; repeat that command, or remove the file"
            )
        for line in lines[1:]:
            self._chunks[line["start"]] = [
                [(text, tuple(ids), cut) for text, ids, cut in group] for group in line["answers"]
            ]
        if data and not data.endswith(b"\n"):
            whole = data[: data.rfind(b"\n") + 1]
            write_atomic(self.path, whole.decode("utf-8"))


def identity_of(values: JsonObject, *paths: Path) -> str:
    """Returns the hash of options and of files or folders (names, sizes, times of change)."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) or [path])]
    stamps = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
    return hash_value({"options": values, "files": stamps})


__all__ = ["CHUNK", "AnswerStore", "StoredAnswer", "identity_of"]
