"""Data files as blocks of UTF-8 bytes, whatever their compression and encoding, and blocks as records.

Nothing here holds more than one block and one record, so memory does not grow with the file.
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
from typing import Any

from easyllm.core.errors import ConfigError, DataError, SourceError, install

BLOCK_BYTES = 1 << 18
MAX_BYTES = 1 << 26
"""Most bytes of one line, row or file that is one document: a broken file may be one endless line."""
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
_MARKS = (  # UTF-32's byte order mark begins with UTF-16's, so it is looked for first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8"),
)


class DamagedFile(DataError):
    """The rest of a file cannot be read: it is cut short or corrupt, or its rows cannot be told apart."""


@dataclass(frozen=True, slots=True)
class Delimiter:
    """What ends a record: a pattern, and the most bytes it matches."""

    pattern: re.Pattern[bytes]
    max_bytes: int

    @classmethod
    def from_text(cls, text: str) -> "Delimiter":
        r"""`text` as a delimiter; its line breaks also match `\r\n`.

        A leading line break leaves the `\r` to the record, which strips it: a pattern that begins with one
        fixed byte is searched at the speed of memory.

        >>> Delimiter.from_text("\n\n").pattern.split(b"one\r\n\r\ntwo\n\nthree")
        [b'one\r', b'two', b'three']
        """
        escaped = re.escape(text.encode("utf-8")).replace(b"\\\n", b"\r?\n").removeprefix(b"\r?")
        return cls(re.compile(escaped), len(text.encode("utf-8")) + text.count("\n"))


LINE = Delimiter.from_text("\n")


def read_blocks(path: str, *, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """A file's text in blocks of UTF-8 bytes: decompressed by suffix, without a byte order mark.

    UTF-16 and UTF-32 with a mark are converted; without one the bytes are as they are, and nobody has looked
    whether they are UTF-8.

    Args:
        start: first byte wanted, where the file `is_divisible`.
        stop: the byte after the last one; None reads to the end.

    Raises:
        DamagedFile: the compressed stream is cut short or corrupt; what came before it has been yielded.
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
        # a lone surrogate becomes bytes that are not UTF-8, and so a bad row instead of a damaged file
        yield from codecs.iterencode(text, "utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise DamagedFile(f"not {encoding.upper()} text ({error.reason})") from None


def read_whole(blocks: Iterable[bytes]) -> bytes | None:
    """All blocks as one, or None where that is more than `MAX_BYTES`."""
    content = bytearray()
    for block in blocks:
        content += block
        if len(content) > MAX_BYTES:
            return None
    return bytes(content)


def split_records(blocks: Iterable[bytes], delimiter: Delimiter = LINE) -> Iterator[bytes | None]:
    """Each record without what ends it; None in the place of one longer than `MAX_BYTES`.

    A delimiter at the very end begins no further record.
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
    """Whether parts of the file can be read alone: it is neither compressed nor in UTF-16 or UTF-32."""
    if path.lower().endswith(COMPRESSIONS):
        return False
    head = next(_raw_blocks(path, 0, 4, 4), b"")
    return _byte_order_mark(head)[1] == "utf-8"


def divide(path: str, delimiter: Delimiter, num_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Cuts a file behind records, each part of `num_bytes` and at most a block and a record more.

    The whole file is read, at the speed of the disk, so that each part knows its first line's number.

    Returns:
        For each part its first byte, the byte after its last, and the number of records before it.
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


def optional(module: str, need: str) -> Any:
    """A module of the extra `data`.

    Raises:
        ConfigError: it is not installed; says that `need` needs it.
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
        if error.errno is None:  # how Arrow and bz2 report a stream they cannot decompress
            raise DamagedFile(f"damaged stream ({error})") from None
        raise SourceError(f"cannot read {path!r}: {os.strerror(error.errno)}") from None


def _open(path: str) -> Any:
    """The decompressed stream; reading any number of bytes takes memory for that many."""
    if path.lower().endswith(".gz"):
        return gzip.GzipFile(path, "rb")
    if path.lower().endswith(".xz"):
        return lzma.LZMAFile(path, "rb")
    if path.lower().endswith(".bz2"):
        return bz2.BZ2File(path, "rb")
    if path.lower().endswith(".zst"):
        # of the two packages that know Zstandard, this one notices a stream that is cut short
        arrow = optional("pyarrow", "compressed .zst files")
        return arrow.CompressedInputStream(arrow.OSFile(path), "zstd")
    return open(path, "rb")


def _byte_order_mark(head: bytes) -> tuple[bytes, str]:
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return mark, encoding
    return b"", "utf-8"
