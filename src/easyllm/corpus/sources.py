"""Sources of documents, divided into splits that can be read separately in constant memory.

    config = SourceConfig(paths=("wiki/*.jsonl.zst", "extra.parquet"))
    for split in list_splits("wiki", config):
        for item in read_split(split, config):  # Document | BadRow

Splits may be read in any order, and in other processes or on other machines with access to the
same files.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from easyllm.core.config import Config
from easyllm.core.errors import ConfigError, DataError, suggest
from easyllm.core.json_types import Json
from easyllm.core.paths import PathText
from easyllm.corpus.document import Document
from easyllm.corpus.document_fields import EMPTY_TEXT, RowKeys, to_document
from easyllm.corpus.files.blocks import (
    LINE,
    DamagedFile,
    Delimiter,
    divide,
    is_divisible,
    optional,
    read_blocks,
)
from easyllm.corpus.files.formats import (
    BadRow,
    Rows,
    read_html,
    read_json,
    read_jsonl,
    read_lines,
    read_markdown,
    read_separated,
    read_text,
)
from easyllm.corpus.files.paths import Format, SourceFile, find_files, plain_suffix
from easyllm.corpus.files.row import Row
from easyllm.corpus.files.tables import (
    csv_columns,
    divide_parquet,
    open_parquet,
    parquet_columns,
    read_csv,
    read_parquet,
)

SPLIT_BYTES = 1 << 26
"""Default size of a split."""
FIX = "fix or remove it"
FIX_OR_SKIP = f"{FIX}, or set on_error: skip"
"""What an error about a bad row advises: the second where users write the source themselves."""
OPENING_BYTES = 1 << 12
"""Minimum size that a file counts as, since opening a file takes as long as reading about this many
bytes."""
ROW_FORMATS = frozenset({"csv", "json", "jsonl", "parquet"})

Paths = Annotated[tuple[PathText, ...], Field(min_length=1)]


class SourceConfig(Config):
    """The files of a source and how to read them."""

    paths: Paths = Field(
        description="Files, folders and patterns (`**` for any depth), as a list or a single "
        "string.",
    )
    format: Literal["auto", Format] = Field(
        "auto",
        description="Format of the files; `auto` detects it by suffix, ignoring the suffix of a "
        "compression (`.gz`, `.zst`, `.xz`, `.bz2`).",
    )
    text_key: str = Field(
        "text",
        min_length=1,
        description="Key or column of the text, in rows of JSON, CSV and Parquet.",
    )
    id_key: str | None = Field(
        None,
        min_length=1,
        description="Key or column of a document's id, unique in the source; by default `id` if "
        "a row has one that is text or an integer, else the row's location, which is "
        "always unique.",
    )
    language_key: str | None = Field(
        None,
        min_length=1,
        description="Key or column of a language code; `en-GB` and `en_GB` are `en`.",
    )
    language: str | None = Field(
        None, pattern="^[a-z]{2,3}$", description="Language of documents that do not give one."
    )
    documents: Literal["file", "line"] = Field(
        "file", description="Documents of a text file: the complete `file`, or each `line`."
    )
    document_separator: str | None = Field(
        None,
        min_length=1,
        description="Separator of the documents in a text file, such as `<|endoftext|>`.",
    )
    on_error: Literal["skip", "stop"] = Field(
        "skip",
        description="What to do with a bad row: `skip` counts and skips it, `stop` ends the build.",
    )

    @field_validator("paths", mode="before", json_schema_input_type=str | Paths)
    @classmethod
    def _one_path(cls, value: object) -> Json:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_are_honoured(self) -> Self:
        if "" in self.paths:
            raise ValueError("paths contains an empty path; give files, folders or patterns")
        if self.documents == "line" and self.document_separator is not None:
            raise ValueError(
                "documents=line and document_separator are mutually exclusive; set only one"
            )
        if self.format not in ("auto", "text") and self.delimiter is not None:
            raise ValueError(f"documents and document_separator are for text, not {self.format}")
        has_keys = (self.text_key, self.id_key, self.language_key) != ("text", None, None)
        if self.format not in ("auto", *ROW_FORMATS) and has_keys:
            raise ValueError(f"text_key, id_key and language_key are for rows, not {self.format}")
        return self

    @property
    def delimiter(self) -> Delimiter | None:
        """The delimiter of documents in a text file; None if the file is one document."""
        if self.documents == "line":
            return LINE
        return Delimiter.from_text(self.document_separator) if self.document_separator else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A file, or a range of it.

    Attributes:
        path: as in `SourceFile`.
        name: as in `SourceFile`.
        format: as in `SourceFile`.
        start: first byte, or first row group of a Parquet file.
        stop: end of the range (exclusive); None for the end of the file.
        first: number of lines, documents or rows in the file before `start`.
        num_bytes: bytes to read, for load balancing and progress.
    """

    path: str
    name: str
    format: Format
    start: int = 0
    stop: int | None = None
    first: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A unit of work: parts of files that are read in sequence."""

    source: str
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes to read in all parts."""
        return sum(part.num_bytes for part in self.parts)


def source_files(config: SourceConfig) -> list[SourceFile]:
    """Returns the files of a source, ordered by name.

    Raises:
        SourceError: a path matches nothing, or its format is unknown.
    """
    return find_files(config.paths, None if config.format == "auto" else config.format)


def list_splits(
    name: str,
    config: SourceConfig,
    *,
    split_bytes: int = SPLIT_BYTES,
    remedy: str = FIX_OR_SKIP,
) -> list[Split]:
    """Divides a source into splits of about `split_bytes`.

    Reading the splits in sequence yields the documents of the source in order. Large uncompressed
    files are divided at lines, separators or row groups; small files are combined. Files are
    ordered by name.

    Args:
        name: name of the source.
        split_bytes: target size of a split in bytes.
        remedy: what an error about a damaged file advises.

    Raises:
        SourceError: a path matches nothing, or its format is unknown.
        DataError: a table lacks a column that `config` names, or, with `on_error=stop`, is damaged.
        ConfigError: an option does not apply to any file, or a format needs a package that is not
            installed.
    """
    if split_bytes < 1:
        raise ConfigError(
            f"split_bytes={split_bytes} is not positive; the default is {SPLIT_BYTES} (64 MiB)"
        )
    files = source_files(config)
    if config.delimiter is not None and not any(file.format == "text" for file in files):
        raise ConfigError(
            f"source {name!r} sets documents or document_separator, which are for text files, "
            "but it has no text files; remove the option"
        )
    _require_packages(files)
    parts = [part for file in files for part in _parts(file, config, split_bytes, remedy)]
    return [Split(source=name, parts=group) for group in _grouped(parts, split_bytes)]


def read_split(
    split: Split, config: SourceConfig, *, remedy: str = FIX_OR_SKIP
) -> Iterator[Document | BadRow]:
    """Yields the documents of a split in order, with a `BadRow` for each invalid row.

    Args:
        split: the split.
        config: its source.
        remedy: what an error about a bad row advises.

    Raises:
        DataError: with `on_error=stop`, at the first bad row; the message gives file and line. An
            empty text is not an error.
        SourceError: a file no longer exists.
    """
    for part in split.parts:
        for item in _read_part(part, split.source, config):
            if config.on_error == "stop" and isinstance(item, BadRow) and item.reason != EMPTY_TEXT:
                raise DataError(f"{item.location}: {item.reason}; {remedy}")
            yield item


def _require_packages(files: Iterable[SourceFile]) -> None:
    """Raises before any work if a package that the files need is not installed.

    The same packages are imported again where they are used.
    """
    for file in files:
        if file.format == "html":
            optional("resiliparse", "HTML files")
        elif file.path.lower().endswith(".zst"):
            optional("pyarrow", "compressed .zst files")


def _parts(file: SourceFile, config: SourceConfig, split_bytes: int, remedy: str) -> Iterator[Part]:
    """Yields the complete file, or ranges of it if it is large and can be read in parts."""
    path, kind = file.path, file.format
    whole = Part(path=path, name=file.name, format=kind, num_bytes=os.path.getsize(path))
    delimiter = LINE if kind == "jsonl" else config.delimiter if kind == "text" else None
    try:
        if kind == "csv":
            columns = csv_columns(read_blocks(path), _comma(path))
            _check_columns(file, config, dict.fromkeys(columns, True))
        if kind == "parquet":
            table = open_parquet(path)
            _check_columns(file, config, parquet_columns(table))
            for start, stop, first, num_bytes in divide_parquet(table, split_bytes):
                yield replace(whole, start=start, stop=stop, first=first, num_bytes=num_bytes)
        elif delimiter and whole.num_bytes > split_bytes and is_divisible(path):
            for start, stop, first in divide(path, delimiter, split_bytes):
                yield replace(whole, start=start, stop=stop, first=first, num_bytes=stop - start)
        else:
            yield whole
    except DamagedFile as error:
        if config.on_error == "stop":
            raise DataError(f"{file.name}: {error}; {remedy}") from None
        yield whole  # reading it will run into the damage again and report it


def _check_columns(file: SourceFile, config: SourceConfig, columns: dict[str, bool]) -> None:
    """Checks that a table has the columns that `config` names.

    Args:
        columns: maps each column of the table to whether it contains text.
    """
    listed = f"(columns: {', '.join(columns)})"
    for option in ("text_key", "id_key", "language_key"):
        key = getattr(config, option)
        if columns and key is not None and key not in columns:
            hint = suggest(key, columns)
            raise DataError(
                f"{file.name} has no column {key!r} {listed}{hint}; set {option} to one of them"
            )
    if not columns.get(config.text_key, True):
        raise DataError(
            f"{file.name}: column {config.text_key!r} does not contain text {listed}; set text_key"
        )


def _grouped(parts: Iterable[Part], split_bytes: int) -> Iterator[tuple[Part, ...]]:
    group: list[Part] = []
    filled = 0
    for part in parts:
        size = max(part.num_bytes, OPENING_BYTES)
        if group and filled + size > split_bytes:
            yield tuple(group)
            group, filled = [], 0
        group.append(part)
        filled += size
    if group:
        yield tuple(group)


def _read_part(part: Part, source: str, config: SourceConfig) -> Iterator[Document | BadRow]:
    keys, location = RowKeys(), part.name
    if part.format in ROW_FORMATS:
        keys = RowKeys(text=config.text_key, id=config.id_key, language=config.language_key)
    try:
        for row in _rows(part, config):
            location = row.location
            if isinstance(row, Row):
                yield to_document(row, keys, source=source, language=config.language)
            else:
                yield row
    except DamagedFile as error:
        yield BadRow(location, f"the rest of the file cannot be read: {error}")


def _rows(part: Part, config: SourceConfig) -> Rows:
    if part.format == "parquet":
        keys = {config.text_key, config.id_key or "id", config.language_key}
        columns = sorted(key for key in keys if key is not None)
        return read_parquet(
            part.path, part.name, columns, start=part.start, stop=part.stop, first=part.first
        )
    blocks = read_blocks(part.path, start=part.start, stop=part.stop)
    match part.format:
        case "jsonl":
            return read_jsonl(blocks, part.name, part.first)
        case "json":
            return read_json(blocks, part.name)
        case "csv":
            return read_csv(blocks, part.name, _comma(part.path))
        case "html":
            return read_html(blocks, part.name)
        case "markdown":
            return read_markdown(blocks, part.name)
        case "text" if config.documents == "line":
            return read_lines(blocks, part.name, part.first)
        case "text" if config.delimiter is not None:
            return read_separated(blocks, part.name, config.delimiter, part.first)
        case _:
            return read_text(blocks, part.name)


def _comma(path: str) -> str:
    return "\t" if plain_suffix(path) == ".tsv" else ","
