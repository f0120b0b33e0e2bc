"""Reads data files of any compression and encoding as UTF-8 blocks, and splits them into records.

At most one block and one record are in memory, so memory use does not grow with the file.
"""

import bz2
import codecs
import gzip
import importlib
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from easyllm.core.errors import ConfigError, DataError, SourceError, install
from easyllm.core.json_types import Json

BLOCK_BYTES = 1 << 18
MAX_BYTES = 1 << 26
"""Maximum bytes of one line, row or single-document file: a broken file may be one endless line."""
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
_MARKS = (  # the UTF-32 byte order mark starts with that of UTF-16, so it is checked first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8"),
)


class DamagedFile(DataError):
    """The rest of a file cannot be read: it is truncated or corrupt, or has no row boundaries."""


@dataclass(frozen=True, slots=True)
class Delimiter:
    """The end of a record.

    Attributes:
        pattern: what to search for.
        max_bytes: the maximum number of bytes that the pattern matches.
    """

    pattern: re.Pattern[bytes]
    max_bytes: int

    @classmethod
    def from_text(cls, text: str) -> "Delimiter":
        r"""Returns `text` as a delimiter; its line breaks also match `\r\n`.

        With a leading line break, the `\r` stays in the record, which strips it: a search for a
        pattern that starts with one fixed byte runs at memory bandwidth.

        >>> Delimiter.from_text("\n\n").pattern.split(b"one\r\n\r\ntwo\n\nthree")
        [b'one\r', b'two', b'three']
        """
        escaped = re.escape(text.encode("utf-8")).replace(b"\\\n", b"\r?\n").removeprefix(b"\r?")
        return cls(re.compile(escaped), len(text.encode("utf-8")) + text.count("\n"))


LINE = Delimiter.from_text("\n")


def read_blocks(path: str, *, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yields a file's text in blocks of UTF-8 bytes, decompressed and without a byte order mark.

    The suffix of the file selects the decompressor. UTF-16 and UTF-32 with a byte order mark are
    converted; without one, the bytes are yielded unchanged and are not checked to be UTF-8.

    Args:
        path: the file.
        start: first byte to read; must be 0 unless the file `is_divisible`.
        stop: the byte after the last one; None reads to the end.

    Raises:
        DamagedFile: the compressed stream is truncated or corrupt; the data before the damage has
            already been yielded.
        SourceError: the file cannot be opened or read.
    """
    blocks = _raw_blocks(path, start, stop, BLOCK_BYTES)
    head = b""
    if start == 0:
        while len(head) < 4 and (block := next(blocks, b"")):
            head += block
    mark, encoding = _byte_order_mark(head)
    if encoding == "utf-8":
        yield from chain([head[len(mark) :]], blocks)
        return
    text = codecs.iterdecode(chain([head], blocks), encoding, "surrogatepass")
    try:
        # A lone surrogate becomes invalid UTF-8: one bad row instead of a damaged file
        yield from codecs.iterencode(text, "utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise DamagedFile(f"not {encoding.upper()} text ({error.reason})") from None


def read_all(blocks: Iterable[bytes]) -> bytes | None:
    """Returns all blocks joined, or None if they exceed `MAX_BYTES`."""
    content = bytearray()
    for block in blocks:
        content += block
        if len(content) > MAX_BYTES:
            return None
    return bytes(content)


def split_records(blocks: Iterable[bytes], delimiter: Delimiter = LINE) -> Iterator[bytes | None]:
    """Yields each record without its delimiter, and None for a record longer than `MAX_BYTES`.

    A delimiter at the very end does not start another record.
    """
    buffer, searched, too_long = bytearray(), 0, False
    for block in blocks:
        buffer += block
        begin = 0
        while match := delimiter.pattern.search(buffer, max(begin, searched)):
            end = match.start()
            yield None if too_long or end - begin > MAX_BYTES else bytes(buffer[begin:end])
            begin, too_long = match.end(), False
        del buffer[:begin]
        if len(buffer) > MAX_BYTES:
            too_long = True
            del buffer[: len(buffer) - delimiter.max_bytes + 1]
        searched = max(0, len(buffer) - delimiter.max_bytes + 1)
    if buffer or too_long:
        yield None if too_long or len(buffer) > MAX_BYTES else bytes(buffer)


def is_divisible(path: str) -> bool:
    """Returns whether parts of the file can be read separately.

    This is the case if the file is neither compressed nor encoded in UTF-16 or UTF-32.
    """
    if path.lower().endswith(COMPRESSIONS):
        return False
    head = next(_raw_blocks(path, 0, 4, 4), b"")
    return _byte_order_mark(head)[1] == "utf-8"


def divide(path: str, delimiter: Delimiter, num_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Divides a file at record boundaries.

    Each part has at least `num_bytes` (except the last), and at most one block and one record more.
    The complete file is read, at disk speed, so that the line number of each part's first record is
    known.

    Returns:
        For each part: its first byte, the byte after its last, and the number of records before it.
    """
    start = end = first = number = position = 0
    tail = b""
    for block in _raw_blocks(path, 0, None, min(num_bytes, BLOCK_BYTES)):
        position += len(block)
        *whole, tail = delimiter.pattern.split(tail + block)
        number += len(whole)
        if whole:
            end = position - len(tail)
        if end - start >= num_bytes:
            yield start, end, first
            start, first = end, number
        tail = tail[1 - delimiter.max_bytes :] if delimiter.max_bytes > 1 else b""
    if position > start:
        yield start, position, first


def optional(module: str, need: str) -> Json:
    """Imports a module of the optional dependency group `data`.

    Args:
        module: the module's full name.
        need: what the module is needed for, as the plural subject of the error message.

    Raises:
        ConfigError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ConfigError(f"{need} need the package {package}; {install('data')}") from None


def _raw_blocks(path: str, start: int, stop: int | None, block_bytes: int) -> Iterator[bytes]:
    try:
        with _open(path) as file:
            if start:
                file.seek(start)
            left = block_bytes if stop is None else stop - start
            while block := file.read1(min(block_bytes, left)):
                left -= len(block) if stop is not None else 0
                yield block
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        kind = (
            "xz"
            if path.lower().endswith(".xz")
            else "bz2"
            if path.lower().endswith(".bz2")
            else "gzip"
        )
        raise DamagedFile(f"damaged {kind} stream ({error})") from None
    except OSError as error:
        if error.errno is None:  # Arrow and bz2 report a stream they cannot decompress like this
            raise DamagedFile(f"damaged stream ({error})") from None
        raise SourceError(f"cannot read {path!r}: {os.strerror(error.errno)}") from None


def _open(path: str) -> Json:
    """Opens the decompressed stream; reading n bytes from it allocates memory for n bytes only."""
    if path.lower().endswith(".gz"):
        return gzip.GzipFile(path, "rb")
    if path.lower().endswith(".xz"):
        return lzma.LZMAFile(path, "rb")
    if path.lower().endswith(".bz2"):
        return bz2.BZ2File(path, "rb")
    if path.lower().endswith(".zst"):
        # Unlike the zstandard package, Arrow detects a truncated stream
        arrow = optional("pyarrow", "compressed .zst files")
        return arrow.CompressedInputStream(arrow.OSFile(path), "zstd")
    return open(path, "rb")


def _byte_order_mark(head: bytes) -> tuple[bytes, str]:
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return mark, encoding
    return b"", "utf-8"
