"""Conversations of the page, kept in an SQLite file.

The file's `user_version` is the version of its layout, and its `application_id` says that it is
ours, so that neither another program's database nor another version's is touched.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject

VERSION = 1
APPLICATION = 0x4C4C4D48
MAX_LISTED = 500
_LAYOUT = """
CREATE TABLE conversations (
  id TEXT PRIMARY KEY,
  title TEXT NOT NULL,
  created INTEGER NOT NULL,   -- milliseconds since 1970, as the page counts them
  updated INTEGER NOT NULL,
  revision INTEGER NOT NULL,
  searched TEXT NOT NULL,     -- title and messages, in lower case
  body TEXT NOT NULL          -- the conversation as JSON
) STRICT;
CREATE INDEX by_time ON conversations (updated DESC);
"""


class RevisionConflict(Exception):
    """The stored conversation is newer than the copy that a client changed."""


class History:
    """The conversations in a file; its methods may be called from any thread.

    Args:
        path: the file; it is created if it does not exist.

    Raises:
        ConfigError: the file is not a history, or of another version; or it cannot be written.

    Example:
        history = History(Path("chats.sqlite"))
        revision = history.put("a1", conversation, revision=0)
        history.search("paris")
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA busy_timeout = 5000")
            self._open()
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                f"--history: {str(path)!r} cannot be used as a history ({error}); give another "
                "file, or a new name"
            ) from None

    def _open(self) -> None:
        """Creates the tables in a new file, or checks the version of an old one."""
        with self._transaction() as sql:
            version = sql.execute("PRAGMA user_version").fetchone()[0]
            application = sql.execute("PRAGMA application_id").fetchone()[0]
            tables = sql.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if not tables and not version and not application:
                for statement in _LAYOUT.split(";"):
                    sql.execute(statement)
                sql.execute(f"PRAGMA application_id = {APPLICATION}")
                sql.execute(f"PRAGMA user_version = {VERSION}")
                return
        if application != APPLICATION:
            raise ConfigError(
                f"--history: {str(self.path)!r} is another program's database; give another file, "
                "or a new name"
            )
        if version != VERSION:
            raise ConfigError(
                f"--history: {str(self.path)!r} is a history of version {version}, and this "
                f"Easyllm reads version {VERSION}; use the Easyllm that wrote it, or give a new "
                "name"
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def search(self, query: str = "") -> list[JsonObject]:
        """Returns conversations that contain a text, newest first, without their messages.

        Upper and lower case are the same; at most `MAX_LISTED` are returned.
        """
        with self._lock:
            rows = self._connection.execute(
                "SELECT id, title, created, updated FROM conversations "
                "WHERE instr(searched, ?) ORDER BY updated DESC, id LIMIT ?",
                (query.strip().lower(), MAX_LISTED),
            ).fetchall()
        names = ("id", "title", "created", "updated")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def get(self, id: str) -> tuple[int, JsonObject] | None:
        """Returns the revision of a conversation, and the conversation; None if there is none."""
        with self._lock:
            row = self._connection.execute(
                "SELECT revision, body FROM conversations WHERE id = ?", (id,)
            ).fetchone()
        return None if row is None else (row[0], json.loads(row[1]))

    def put(self, id: str, conversation: JsonObject, *, revision: int) -> int:
        """Stores a conversation and returns its new revision.

        Args:
            id: its id.
            conversation: has `title`, and `nodes` with `content`, which are searched.
            revision: of the copy that was changed; 0 for a new conversation.

        Raises:
            RevisionConflict: another revision is stored.
        """
        now = int(time.time() * 1000)
        body = json.dumps(conversation, ensure_ascii=False).encode("utf-8", "replace").decode()
        with self._transaction() as sql:
            row = sql.execute("SELECT revision FROM conversations WHERE id = ?", (id,)).fetchone()
            if (row[0] if row else 0) != revision:
                raise RevisionConflict
            sql.execute(
                "INSERT OR REPLACE INTO conversations VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    *(id, str(conversation.get("title", ""))),
                    *(_time(conversation, "created", now), _time(conversation, "updated", now)),
                    *(revision + 1, _searched(conversation), body),
                ),
            )
        return revision + 1

    def delete(self, id: str) -> bool:
        """Removes a conversation; returns whether there was one."""
        with self._transaction() as sql:
            return sql.execute("DELETE FROM conversations WHERE id = ?", (id,)).rowcount > 0

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._connection.close()


def _time(conversation: JsonObject, name: str, now: int) -> int:
    value = conversation.get(name)
    return value if isinstance(value, int) and 0 <= value < 2**53 else now


def _searched(conversation: JsonObject) -> str:
    """Returns the text in which a conversation is searched."""
    nodes = conversation.get("nodes")
    contents = [
        str(node.get("content", ""))
        for node in (nodes.values() if isinstance(nodes, dict) else ())
        if isinstance(node, dict)
    ]
    text = "\n".join([str(conversation.get("title", "")), *contents]).lower()
    return text.encode("utf-8", "replace").decode()
