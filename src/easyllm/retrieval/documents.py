"""Reads documents as text: plain text, Markdown, HTML, PDF.

Every file that cannot be read is refused with its reason; the caller decides whether to continue
with the others. Documents are untrusted input: sizes are bounded, and nothing in them is executed.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from easyllm.core.errors import ConfigError, DataError, install
from easyllm.corpus.extract import html_text, markdown_text

MAX_BYTES = 64 * 2**20
MAX_PAGES = 5_000
MAX_CHARACTERS = 64 * 2**20
SNIFFED_BYTES = 8192
_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A document's text.

    Attributes:
        name: by which it is cited: its path in the indexed folder.
        text: its text.
        sha256: of its content, in hexadecimal.
        is_markdown: whether lines that begin with `#` are headings.
        page_starts: for a PDF, the first character of each page.
    """

    name: str
    text: str
    sha256: str
    is_markdown: bool = False
    page_starts: tuple[int, ...] = ()


def read_document(path: Path, name: str) -> Document:
    """Reads a file.

    Args:
        path: the file, with a suffix of `KINDS`.
        name: by which it is cited.

    Raises:
        DataError: it is too large, damaged, encrypted, binary, or contains no text.
        ConfigError: the package that reads its kind is not installed.
    """
    content = read_content(path)
    read, is_markdown = KINDS[path.suffix.lower()]
    text, starts = read(content, path)
    if len(text) > MAX_CHARACTERS:
        raise DataError(
            f"{path} contains {len(text):,} characters, more than the maximum of "
            f"{MAX_CHARACTERS:,}; split it"
        )
    if not text.strip():
        reason = "its pages may be scans: recognise their text first" if starts else "remove it"
        raise DataError(f"{path} contains no text; {reason}")
    return Document(
        name=name,
        text=text,
        sha256=hashlib.sha256(content).hexdigest(),
        is_markdown=is_markdown,
        page_starts=starts,
    )


def read_content(path: Path) -> bytes:
    """Returns the bytes of a file of an acceptable size.

    Raises:
        DataError: it is larger than `MAX_BYTES`, or cannot be read.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(
                f"{path} has {size:,} bytes, more than the maximum of {MAX_BYTES:,}; split it, or "
                "move it out of the folder"
            )
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read {path}: {os.strerror(error.errno or 0)}") from None
    if len(content) > MAX_BYTES:
        raise DataError(f"{path} grew above {MAX_BYTES:,} bytes while it was read; split it")
    return content


def _plain(content: bytes, path: Path) -> tuple[str, tuple[int, ...]]:
    """Decodes text: UTF-8, or UTF-16 with a byte order mark, or GB 18030.

    Raises:
        DataError: it is none of them, or binary.
    """
    for mark, encoding in _BOMS:
        if content.startswith(mark):
            return _decoded(content, ("utf-8-sig" if encoding == "utf-8" else encoding,), path), ()
    if b"\0" in content[:SNIFFED_BYTES]:
        raise DataError(f"{path} is binary, not text; remove it, or give its text")
    return _decoded(content, ("utf-8", "gb18030"), path), ()


def _decoded(content: bytes, encodings: tuple[str, ...], path: Path) -> str:
    for encoding in encodings:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        control = sum(c < " " and c not in "\t\n\r\f" for c in text[:SNIFFED_BYTES])
        if control <= len(text[:SNIFFED_BYTES]) * 0.01:
            return text.replace("\r\n", "\n").replace("\r", "\n")
    raise DataError(f"{path} is not text in {' or '.join(encodings)}; convert it to UTF-8")


def _markdown(content: bytes, path: Path) -> tuple[str, tuple[int, ...]]:
    return markdown_text(_plain(content, path)[0]), ()


def _html(content: bytes, path: Path) -> tuple[str, tuple[int, ...]]:
    try:
        return html_text(content), ()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _pdf(content: bytes, path: Path) -> tuple[str, tuple[int, ...]]:
    """Returns the text of a PDF, its pages separated by blank lines.

    pypdf reads the characters of fonts that are not embedded correctly in simplified and
    traditional Chinese, where others give wrong ones. Columns come in the order of drawing.

    Raises:
        DataError: the file is damaged or encrypted, or has too many pages.
    """
    try:
        import pypdf
    except ImportError:
        raise ConfigError(f"PDF files need the package pypdf; {install('rag')}") from None
    import io
    import logging

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # its warnings repeat what is raised here
    try:
        reader = pypdf.PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            raise DataError(f"{path} is encrypted; remove its password first")
        count = len(reader.pages)
        if count > MAX_PAGES:
            raise DataError(f"{path} has {count} pages, more than {MAX_PAGES}; split it")
        pages = [page.extract_text() for page in reader.pages]
    except DataError:
        raise
    except Exception as error:  # pypdf raises many types on damaged files
        detail = " ".join(str(error).split())[:100] or type(error).__name__
        raise DataError(f"{path} is not a readable PDF ({detail}); export it again") from None
    starts, parts, at = list[int](), list[str](), 0
    for page in pages:
        text = page.encode("utf-8", "replace").decode("utf-8").replace("\0", "")
        starts.append(at)
        parts.append(text)
        at += len(text) + 2
    return "\n\n".join(parts), tuple(starts)


Reader = Callable[[bytes, Path], tuple[str, tuple[int, ...]]]
KINDS: dict[str, tuple[Reader, bool]] = {
    ".txt": (_plain, False),
    ".text": (_plain, False),
    ".rst": (_plain, False),
    ".md": (_markdown, True),
    ".markdown": (_markdown, True),
    ".html": (_html, False),
    ".htm": (_html, False),
    ".pdf": (_pdf, False),
}
"""By suffix: how a file becomes text, and whether the text is Markdown."""

__all__ = ["KINDS", "MAX_BYTES", "Document", "read_content", "read_document"]
