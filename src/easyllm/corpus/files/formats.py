"""Readers of the file formats, which convert blocks of bytes to rows with their locations.

A reader yields a `BadRow` if it can continue after an invalid row, and raises `DamagedFile` if it
cannot.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from easyllm.core.errors import DataError
from easyllm.core.json_types import Json
from easyllm.corpus.extract import html_text, markdown_text
from easyllm.corpus.files.blocks import (
    MAX_BYTES,
    DamagedFile,
    Delimiter,
    read_all,
    split_records,
)
from easyllm.corpus.files.row import Row


@dataclass(frozen=True, slots=True)
class BadRow:
    """An invalid row: its location (as in `Row`) and the reason, in a few words."""

    location: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without its details, for counting.

        >>> BadRow("a.jsonl:3", "not JSON (Expecting value at character 9)").kind
        'not JSON'
        """
        return _PARTICULARS.split(self.reason, maxsplit=1)[0]


_PARTICULARS = re.compile(r" \(|: ")
Rows = Iterator[Row | BadRow]
TOO_LONG = f"longer than {MAX_BYTES >> 20} MiB"


def read_text(blocks: Iterable[bytes], name: str) -> Rows:
    """Yields the complete file as the `text` of one row."""
    too_long = f"{TOO_LONG} as one document; set documents: line, or document_separator"
    yield _text_row(read_all(blocks), name, _plain, too_long)


def read_markdown(blocks: Iterable[bytes], name: str) -> Rows:
    """Yields the complete file as the `text` of one row, without front matter and comments."""
    yield _text_row(read_all(blocks), name, lambda content: markdown_text(_plain(content)))


def read_html(blocks: Iterable[bytes], name: str) -> Rows:
    """Yields the main text of the page as the `text` of one row."""
    yield _text_row(read_all(blocks), name, html_text)


def read_lines(blocks: Iterable[bytes], name: str, first: int = 0) -> Rows:
    """Yields each line that is not blank as the `text` of a row.

    Args:
        first: number of lines in the file before the blocks.
    """
    for number, line in enumerate(split_records(blocks), first + 1):
        if not _is_blank(line):
            yield _text_row(line, f"{name}:{number}", _piece)


def read_separated(
    blocks: Iterable[bytes], name: str, delimiter: Delimiter, first: int = 0
) -> Rows:
    """Yields each piece between delimiters as the `text` of a row, without line breaks around it.

    Blank pieces are skipped.

    Args:
        first: number of pieces in the file before the blocks.
    """
    for index, piece in enumerate(split_records(blocks, delimiter), first):
        if not _is_blank(piece):
            yield _text_row(piece, f"{name}[{index}]", _piece)


def read_jsonl(blocks: Iterable[bytes], name: str, first: int = 0) -> Rows:
    """Yields the JSON object on each line that is not blank.

    Args:
        first: number of lines in the file before the blocks.
    """
    for number, line in enumerate(split_records(blocks), first + 1):
        if not _is_blank(line):
            yield _json_row(line, f"{name}:{number}")


def read_json(blocks: Iterable[bytes], name: str) -> Rows:
    """Yields the objects of a JSON array, or consecutive JSON objects.

    Files named .json often contain JSON lines.
    """
    blocks = iter(blocks)
    head = next(blocks, b"")
    blocks, start = chain([head], blocks), head.strip()
    line, line_break, _ = start.partition(b"\n")
    is_array, is_indented = start.startswith(b"["), line_break and not line.rstrip().endswith(b"}")
    if is_array or (start.startswith(b"{") and is_indented):
        return _read_values(blocks, name, is_array=is_array)
    return read_jsonl(blocks, name)


def _text_row(
    content: bytes | None,
    location: str,
    convert: Callable[[bytes], str],
    too_long: str = TOO_LONG,
) -> Row | BadRow:
    if content is None:
        return BadRow(location, too_long)
    try:
        return Row({"text": convert(content)}, location)
    except DataError as error:
        return BadRow(location, str(error))


def _plain(content: bytes) -> str:
    if b"\0" in content:
        raise DataError("contains NUL bytes: not text, or UTF-16 without a byte order mark")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 text (byte {content[error.start]:#04x} at {error.start})"
        ) from None


def _piece(content: bytes) -> str:
    return _plain(content).strip("\r\n")


def _is_blank(record: bytes | None) -> bool:
    return record is not None and not record.strip()


def _json_row(line: bytes | None, location: str) -> Row | BadRow:
    if line is None:
        return BadRow(location, TOO_LONG)
    try:
        return _object_row(json.loads(line.decode("utf-8")), location)
    except UnicodeDecodeError as error:
        return BadRow(location, f"not UTF-8 text (byte {line[error.start]:#04x} at {error.start})")
    except json.JSONDecodeError as error:
        return BadRow(location, f"not JSON ({error.msg} at character {error.pos + 1})")
    except ValueError as error:  # a number with too many digits
        return BadRow(location, f"not JSON ({error})")
    except RecursionError:
        return BadRow(location, "JSON nested too deeply")


def _object_row(value: object, location: str) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(value, location)
    return BadRow(location, f"a JSON {type(value).__name__}, expected an object")


def _read_values(blocks: Iterable[bytes], name: str, *, is_array: bool) -> Rows:
    # a byte that is not UTF-8 becomes a lone surrogate, so that only its row is bad
    text = _JsonText(codecs.iterdecode(blocks, "utf-8", "surrogateescape"))
    if is_array:
        text.skip("[")
    index = 0
    while text.peek() not in ("", "]"):
        yield _object_row(text.value(), f"{name}[{index}]")
        index += 1
        if is_array and text.peek() != "]":
            text.skip(",")
    if is_array:
        text.skip("]")
    if text.peek():
        raise DamagedFile(f"not JSON (got {text.peek()!r} after the last value)")


class _JsonText:
    """Parses JSON values from pieces of text, buffering little more than the current value."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces, self._held, self._position = pieces, "", 0

    def peek(self) -> str:
        """Returns the next character that is not whitespace, or "" at the end."""
        while True:
            while self._position < len(self._held):
                if (character := self._held[self._position]) not in " \t\r\n":
                    return character
                self._position += 1
            if not self._grow():
                return ""

    def skip(self, expected: str) -> None:
        """Skips the next character, which must be `expected`."""
        if self.peek() != expected:
            got = repr(self.peek()) if self.peek() else "the end"
            raise DamagedFile(f"not JSON (expected {expected!r}, got {got})")
        self._position += 1

    def value(self) -> Json:
        """Parses and returns the next value."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._held, self._position)
            except json.JSONDecodeError as error:
                if not (self._may_be_cut(error) and self._grow()):
                    raise DamagedFile(f"not JSON ({error.msg})") from None
            except (
                ValueError,
                RecursionError,
            ) as error:  # a number with too many digits, or nested too deeply
                raise DamagedFile(f"not JSON ({error})") from None
            else:
                # `.`, `e` or `e+` after a number may continue it, with the rest in the next piece
                is_whole = isinstance(value, dict) or len(self._held) - end > len("e+")
                if is_whole or not self._grow():
                    self._position = end
                    return value

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Returns whether the error may be due to a truncated value.

        Literals, escapes and the beginnings of numbers are shorter than 16 characters.
        """
        return error.msg.startswith("Unterminated") or error.pos > len(self._held) - 16

    def _grow(self) -> bool:
        """Doubles the buffered text after the position, so that a long value is reparsed few times.

        Returns:
            False if there is no more text; then nothing has changed.
        """
        rest = self._held[self._position :]
        if len(rest) > MAX_BYTES:
            raise DamagedFile(f"a value {TOO_LONG}")
        pieces, size = [rest], 0
        for piece in self._pieces:
            pieces.append(piece)
            size += len(piece)
            if size >= len(rest):
                break
        if size == 0:
            return False
        self._held, self._position = "".join(pieces), 0
        return True


_DECODER = json.JSONDecoder()
