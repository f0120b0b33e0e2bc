"""Readers of CSV and Parquet tables: rows with their locations, and the names of the columns."""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from easyllm.core.errors import SourceError
from easyllm.corpus.files.blocks import BLOCK_BYTES, MAX_BYTES, DamagedFile, optional, split_records
from easyllm.corpus.files.formats import TOO_LONG, BadRow, Rows
from easyllm.corpus.files.row import Row

ParquetFile: TypeAlias = Any
"""A `pyarrow.parquet.ParquetFile`; pyarrow comes without types."""
ArrowData: TypeAlias = Any
"""A batch, column or type of pyarrow."""
CsvReader: TypeAlias = Any
"""A `csv.reader`, whose type has no public name."""
BATCH_BYTES = 1 << 22
"""Approximate size of the Parquet columns that are decoded at a time (a page is the minimum)."""


def read_csv(blocks: Iterable[bytes], name: str, delimiter: str) -> Rows:
    """Yields each record after the header as a row; quoted fields may contain line breaks."""
    lines = _CsvLines(blocks)
    records = _csv_reader(lines, delimiter)
    header = _csv_header(records)
    while True:
        lines.num_bytes = 0
        location = f"{name}:{records.line_num + 1}"
        try:
            fields = next(records, None)
        except csv.Error as error:
            yield BadRow(location, f"not CSV ({error})")
            continue
        if fields is None:
            return
        if fields and len(fields) != len(header):
            yield BadRow(location, f"{len(fields)} fields, but the header has {len(header)}")
        elif fields:
            yield Row(dict(zip(header, fields, strict=True)), location)


def csv_columns(blocks: Iterable[bytes], delimiter: str) -> list[str]:
    """Returns the column names in the header, or an empty list for an empty file."""
    return _csv_header(_csv_reader(_CsvLines(blocks), delimiter))


def open_parquet(path: str) -> ParquetFile:
    """Opens a `pyarrow.parquet.ParquetFile`, which reads its pages on demand.

    Raises:
        ConfigError: the package pyarrow is not installed.
        DamagedFile: the file is not a Parquet file, or is truncated.
        SourceError: the file cannot be read.
    """
    parquet = optional("pyarrow.parquet", "Parquet files")
    with _parquet_errors(path):
        return parquet.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False)


def parquet_columns(file: ParquetFile) -> dict[str, bool]:
    """Maps the name of each column to whether it contains text."""
    return {field.name: _is_text(field.type) for field in file.schema_arrow}


def divide_parquet(file: ParquetFile, num_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Divides a Parquet file into ranges of row groups.

    Each range has the smallest number of row groups whose uncompressed size reaches `num_bytes`.

    Yields:
        First row group of the range, last row group plus one, number of rows before the range, and
        its uncompressed bytes.
    """
    start = first = rows = size = 0
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        rows, size = rows + metadata.num_rows, size + metadata.total_byte_size
        if size >= num_bytes or group == file.num_row_groups - 1:
            yield start, group + 1, first, size
            start, first, size = group + 1, rows, 0


def read_parquet(
    path: str,
    name: str,
    columns: Sequence[str],
    *,
    start: int = 0,
    stop: int | None = None,
    first: int = 0,
) -> Rows:
    """Yields each row of a range of row groups, with those of `columns` that the file has.

    Args:
        start: first row group.
        stop: last row group plus one; None for the end of the file.
        first: number of rows in the file before row group `start`.
    """
    file = open_parquet(path)
    columns = [column for column in columns if column in file.schema_arrow.names]
    index = first
    for group in range(start, file.num_row_groups if stop is None else stop):
        following = index + file.metadata.row_group(group).num_rows
        try:
            for values in _group_values(file, group, columns):
                yield Row(dict(zip(columns, values, strict=True)), f"{name}[{index}]")
                index += 1
        except DamagedFile as error:
            yield BadRow(
                f"{name}[{index}]", f"the rest of row group {group} cannot be read: {error}"
            )
        index = following


class _CsvLines:
    """Yields lines for the csv module, and counts the bytes of the current row."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._lines = split_records(blocks)
        self.num_bytes = 0

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.num_bytes += 0 if line is None else len(line)
        if line is None or self.num_bytes > MAX_BYTES:
            raise DamagedFile(f"a row {TOO_LONG}; a quote may not be closed")
        return line.decode("utf-8", "surrogateescape") + "\n"


def _csv_reader(lines: _CsvLines, delimiter: str) -> CsvReader:
    # the limit is global to the process and is only ever increased; _CsvLines bounds the rows
    csv.field_size_limit(max(csv.field_size_limit(), MAX_BYTES + 1))
    return csv.reader(lines, delimiter=delimiter, strict=True)


def _csv_header(records: CsvReader) -> list[str]:
    try:
        return next((fields for fields in records if fields), [])
    except csv.Error as error:
        raise DamagedFile(f"not CSV ({error})") from None


def _group_values(
    file: ParquetFile, group: int, columns: Sequence[str]
) -> Iterator[tuple[Any, ...]]:
    """Yields the rows of a row group, decoded in batches of about `BATCH_BYTES`."""
    metadata = file.metadata.row_group(group)
    num_rows = BATCH_BYTES * metadata.num_rows // max(1, metadata.total_byte_size)
    batches = file.iter_batches(max(1, min(4096, num_rows)), row_groups=[group], columns=columns)
    while (batch := _next_batch(batches)) is not None:
        yield from zip(*(_column(batch.column(column)) for column in columns), strict=True)


def _next_batch(batches: Iterator[ArrowData]) -> ArrowData:
    with _parquet_errors("the file"):
        return next(batches, None)


def _column(column: ArrowData) -> list[Any]:
    """Returns the values of a column; invalid UTF-8 becomes lone surrogates, as in CSV."""
    if not _is_text(column.type):
        values: list[Any] = column.to_pylist()
        return values
    binary = optional("pyarrow", "Parquet files").large_binary()
    contents = column.cast(binary).to_pylist()
    return [None if c is None else c.decode("utf-8", "surrogateescape") for c in contents]


def _is_text(kind: ArrowData) -> bool:
    types = optional("pyarrow", "Parquet files").types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


@contextmanager
def _parquet_errors(path: str) -> Iterator[None]:
    arrow = optional("pyarrow", "Parquet files")
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise SourceError(f"cannot read {path!r}: {os.strerror(error.errno)}") from None
        raise DamagedFile(f"damaged Parquet file ({error})") from None
