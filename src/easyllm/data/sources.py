"""Sources: where documents come from, cut into splits that can be read apart, each in constant memory.

    config = SourceConfig(paths=("wiki/*.jsonl.zst", "extra.parquet"))
    for split in list_splits("wiki", config):
        for item in read_split(split, config):  # Document | BadRow

Splits may be read in any order, in other processes, on other machines that see the same files.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from easyllm.core.config import Config
from easyllm.core.errors import ConfigError, DataError, suggest
from easyllm.data.blocks import (
    LINE,
    DamagedFile,
    Delimiter,
    divide,
    is_divisible,
    optional,
    read_blocks,
)
from easyllm.data.documents import Document
from easyllm.data.readers import (
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
from easyllm.data.row import Row
from easyllm.data.row_documents import EMPTY_TEXT, RowKeys, to_document
from easyllm.data.source_files import Format, SourceFile, find_files, plain_suffix
from easyllm.data.tables import (
    csv_columns,
    divide_parquet,
    open_parquet,
    parquet_columns,
    read_csv,
    read_parquet,
)

SPLIT_BYTES = 1 << 26
OPENING_BYTES = 1 << 12
"""A file counts for as many bytes at least: opening one costs about as much as reading them."""
ROW_FORMATS = frozenset({"csv", "json", "jsonl", "parquet"})


class SourceConfig(Config):
    """Where documents come from and how files are read.

    Attributes:
        paths: files, folders and patterns (`**` for any depth); one may stand alone.
        format: what the files hold; `auto` tells it by suffix, those of compressions (`.gz`, `.zst`, `.xz`, `.bz2`) taken off.
        text_key: the key or column of the text, in rows of JSON, CSV and Parquet.
        id_key: the key or column of a document's id, unique in the source. None takes `id` where a JSON row
            has one that is text or a whole number, else the row's place, which is always unique.
        language_key: the key or column of a language code; `en-GB` and `en_GB` are `en`.
        language: the language of documents that name none themselves.
        documents: whether a text file is one document, or each of its lines.
        document_separator: what stands between the documents of a text file (`"<|endoftext|>"`, `"\\n\\n"`).
        on_error: what happens at a bad row: it is yielded as `BadRow`, or everything stops.
    """

    paths: tuple[str, ...] = Field(min_length=1)
    format: Literal["auto", Format] = "auto"
    text_key: str = Field(default="text", min_length=1)
    id_key: str | None = Field(default=None, min_length=1)
    language_key: str | None = Field(default=None, min_length=1)
    language: str | None = Field(default=None, pattern="^[a-z]{2,3}$")
    documents: Literal["file", "line"] = "file"
    document_separator: str | None = Field(default=None, min_length=1)
    on_error: Literal["skip", "stop"] = "skip"

    @field_validator("paths", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_are_honoured(self) -> Self:
        if "" in self.paths:
            raise ValueError("paths holds an empty one; name files, folders or patterns")
        if self.documents == "line" and self.document_separator is not None:
            raise ValueError("documents=line and document_separator exclude each other; set one")
        if self.format not in ("auto", "text") and self.delimiter is not None:
            raise ValueError(f"documents and document_separator are for text, not {self.format}")
        has_keys = (self.text_key, self.id_key, self.language_key) != ("text", None, None)
        if self.format not in ("auto", *ROW_FORMATS) and has_keys:
            raise ValueError(f"text_key, id_key and language_key are for rows, not {self.format}")
        return self

    @property
    def delimiter(self) -> Delimiter | None:
        """What ends a document in a text file; None: the file does."""
        if self.documents == "line":
            return LINE
        return Delimiter.from_text(self.document_separator) if self.document_separator else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A file, or a range of it.

    Attributes:
        path, name, format: as in `SourceFile`.
        start, stop: bytes, or row groups of Parquet; to the end where stop is None.
        first: lines, documents or rows of the file before `start`.
        num_bytes: how much there is to read, for sharing out work and showing progress.
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
    """A unit of work: parts of files that are read one after the other."""

    source: str
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """The split as JSON holds it."""
        return asdict(self) | {"parts": [asdict(part) for part in self.parts]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The split `as_dict` was taken of."""
        return cls(source=values["source"], parts=tuple(Part(**part) for part in values["parts"]))


def list_splits(name: str, config: SourceConfig, *, split_bytes: int = SPLIT_BYTES) -> list[Split]:
    """A source in splits of about `split_bytes`; read one after the other they yield its documents in order.

    Large files are cut between lines, separators or row groups, where they are not compressed; small files are
    put together. The order of files is that of their names.

    Raises:
        SourceError: a path matches nothing, or its format is unknown.
        DataError: a table has no column that `config` names; under `on_error=stop` also a damaged one.
        ConfigError: an option has nothing to apply to, or a format needs a package that is not installed.
    """
    if split_bytes < 1:
        raise ConfigError(f"split_bytes={split_bytes} is not positive; 64 MiB is {SPLIT_BYTES}")
    files = find_files(config.paths, None if config.format == "auto" else config.format)
    if config.delimiter is not None and not any(file.format == "text" for file in files):
        raise ConfigError(
            f"source {name!r} sets documents or document_separator, which are for text files, and has none"
        )
    _require_packages(files)
    parts = [part for file in files for part in _parts(file, config, split_bytes)]
    return [Split(source=name, parts=group) for group in _grouped(parts, split_bytes)]


def read_split(split: Split, config: SourceConfig) -> Iterator[Document | BadRow]:
    """The documents of a split in order, and in their places the rows no document can be made of.

    Raises:
        DataError: under `on_error=stop`, the first bad row; its file and line are named. An empty text is none.
        SourceError: a file is no longer there.
    """
    for part in split.parts:
        for item in _read_part(part, split.source, config):
            if config.on_error == "stop" and isinstance(item, BadRow) and item.reason != EMPTY_TEXT:
                raise DataError(
                    f"{item.place}: {item.reason}; mend or remove it, or set on_error: skip"
                )
            yield item


def _require_packages(files: Iterable[SourceFile]) -> None:
    """Refuses what cannot be read here before any work; the same packages are asked for where they are used."""
    for file in files:
        if file.format == "html":
            optional("resiliparse", "HTML files")
        elif file.path.lower().endswith(".zst"):
            optional("pyarrow", "compressed .zst files")


def _parts(file: SourceFile, config: SourceConfig, split_bytes: int) -> Iterator[Part]:
    """The file whole, or in ranges where it is large and can be read in parts."""
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
            raise DataError(
                f"{file.name}: {error}; mend or remove it, or set on_error: skip"
            ) from None
        yield whole  # whoever reads it meets the damage again, and reports it


def _check_columns(file: SourceFile, config: SourceConfig, columns: dict[str, bool]) -> None:
    """Refuses a table without the columns `config` names; `columns` says of each whether it holds text."""
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
            f"{file.name}: column {config.text_key!r} holds no text {listed}; set text_key"
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
    keys, place = RowKeys(), part.name
    if part.format in ROW_FORMATS:
        keys = RowKeys(text=config.text_key, id=config.id_key, language=config.language_key)
    try:
        for row in _rows(part, config):
            place = row.place
            if isinstance(row, Row):
                yield to_document(row, keys, source=source, language=config.language)
            else:
                yield row
    except DamagedFile as error:
        yield BadRow(place, f"the rest of the file cannot be read: {error}")


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
