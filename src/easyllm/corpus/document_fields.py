"""Converts rows to documents: the keys of text, id and language, and the checks of a text."""

import re
from dataclasses import dataclass

from easyllm.corpus.document import Document
from easyllm.corpus.files.blocks import MAX_BYTES
from easyllm.corpus.files.formats import TOO_LONG, BadRow
from easyllm.corpus.files.row import Row

EMPTY_TEXT = "empty text"
"""Reason of a `BadRow` that is not an error: the row is counted and never stops a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowKeys:
    """Keys of a row under which the fields of a document are stored.

    Attributes:
        text: key of the text.
        id: key of the id; None uses `id` if that is text or an integer, else the row's location.
        language: key of the language, if any.
    """

    text: str = "text"
    id: str | None = None
    language: str | None = None


def to_document(row: Row, keys: RowKeys, *, source: str, language: str | None) -> Document | BadRow:
    """Returns the row as a document, or a `BadRow` with the reason why it is not valid.

    Args:
        source: name of the source.
        language: language of a row that does not give one.
    """
    text, id = row.values.get(keys.text), row.values.get(keys.id or "id")
    if not isinstance(text, str):
        return BadRow(row.location, _wrong(row, keys.text))
    if not _is_id(id):
        if keys.id is not None:
            return BadRow(row.location, _wrong(row, keys.id))
        id = row.location
    if not text or text.isspace():
        return BadRow(row.location, EMPTY_TEXT)
    if len(text) > MAX_BYTES:
        return BadRow(row.location, TOO_LONG)
    if not (_is_utf8(text) and _is_utf8(str(id))):
        return BadRow(row.location, "contains bytes that are not UTF-8, or an unpaired surrogate")
    own = language_code(row.values.get(keys.language)) if keys.language else None
    return Document(id=str(id), source=source, text=text, language=own or language)


def language_code(tag: object) -> str | None:
    """Returns the language of a tag like `en`, `en-GB` or `zh_Hans`, or None for anything else.

    >>> language_code("zh-CN"), language_code("Chinese")
    ('zh', None)
    """
    match = re.match("([A-Za-z]{2,3})(?:[-_]|$)", tag) if isinstance(tag, str) else None
    return match[1].lower() if match else None


def _is_id(value: object) -> bool:
    if isinstance(value, str):
        return value != ""
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(row: Row, key: str) -> str:
    if key in row.values:
        value = row.values[key]
        return f"{key!r} is {'empty' if value == '' else f'of type {type(value).__name__}'}"
    keys = ", ".join(row.values)
    keys = keys if len(keys) <= 200 else f"{keys[:200]}..."
    return f"no key {key!r} (keys: {_escape(keys) or 'none'})"


def _escape(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _is_utf8(text: str) -> bool:
    if text.isascii():  # constant time
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
