"""Texts of the files that a tokenizer command reads."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from easyllm.corpus.sources import SourceConfig, Split


def text_source(paths: list[str], text_key: str, lines: bool, format: str) -> "SourceConfig":
    """Returns the source of a command's text files; an invalid row stops reading."""
    from easyllm.core.config import validate
    from easyllm.corpus.sources import SourceConfig

    values = {"paths": paths, "format": format, "text_key": text_key, "on_error": "stop"}
    values |= {"documents": "line"} if lines else {}
    return validate(SourceConfig, values, source="tokenizer")


def texts_of(source: "SourceConfig") -> Iterator[str]:
    """Yields the source's texts under a progress bar.

    Raises:
        DataError: a row has no text, or a table lacks the column; the message names the option
            that selects another one.
    """
    from easyllm.core.errors import DataError
    from easyllm.core.progress import track
    from easyllm.corpus.sources import FIX, list_splits

    try:
        splits = list_splits("text", source, remedy=FIX)
    except DataError as error:
        flag = " (--text-key)" if "text_key" in str(error) else ""
        raise DataError(f"{error}{flag}") from None
    texts = (text for split in splits for text in _read_texts(split, source))
    return track(texts, "reading", unit="text")


def _read_texts(split: "Split", source: "SourceConfig") -> Iterator[str]:
    from easyllm.core.errors import DataError
    from easyllm.corpus.document import Document
    from easyllm.corpus.document_fields import EMPTY_TEXT
    from easyllm.corpus.sources import FIX, read_split

    for item in read_split(split, source.model_copy(update={"on_error": "skip"})):
        if isinstance(item, Document):
            yield item.text
        elif item.reason != EMPTY_TEXT:
            is_key = item.reason.startswith(
                (f"no key {source.text_key!r}", f"{source.text_key!r} is")
            )
            remedy = "name the key of the text with --text-key" if is_key else FIX
            raise DataError(f"{item.location}: {item.reason}; {remedy}")


def hashes_of(source: "SourceConfig") -> dict[str, str]:
    """Returns the hash of each file of a source, by its name."""
    from easyllm.core.manifest import hash_file
    from easyllm.corpus.sources import source_files

    return {file.name: hash_file(Path(file.path)) for file in source_files(source)}
