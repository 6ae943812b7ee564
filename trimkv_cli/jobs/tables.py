"""Reads prompts from a column of a CSV or Parquet file; a row is a line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal

from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.jobs.reading import Line

Table = Literal["csv", "parquet"]

_BATCH_ROWS = 256


class TableReader:
    """Iterate, once, over the cells of one column as lines, numbered from 1 below the header."""

    def __init__(self, stream: BinaryIO, table: Table, column: str, *, max_line_bytes: int) -> None:
        self.blank_lines = 0
        self._stream = stream
        self._table = table
        self._column = column
        self._limit = max_line_bytes

    def __iter__(self) -> Iterator[Line]:
        with self._stream:
            cells = self._csv_cells() if self._table == "csv" else self._parquet_cells()
            for number, cell in enumerate(cells, 1):
                line = self._line(number, cell)
                if line is None:
                    self.blank_lines += 1
                else:
                    yield line

    def _line(self, number: int, cell: object) -> Line | None:
        if cell is None or cell == "":
            return None
        if not isinstance(cell, str):
            return Line(number=number, problem=f"column {self._column!r} holds no text, but {type(cell).__name__}")
        if any("\udc80" <= character <= "\udcff" for character in cell):
            return Line(number=number, problem="invalid UTF-8")
        if len(cell.encode()) > self._limit:
            return Line(number=number, problem=f"the prompt is longer than {self._limit:,} bytes")
        return Line(number=number, text=cell)

    def _csv_cells(self) -> Iterator[object]:
        csv.field_size_limit(max(self._limit * 4, 1 << 17))
        text = io.TextIOWrapper(self._stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(text)
        try:
            place = self._place(next(rows, []))
            for row in rows:
                yield row[place] if place < len(row) else None
        except csv.Error as error:
            raise InputError(f"line {rows.line_num} of the input is no CSV: {error}") from error

    def _parquet_cells(self) -> Iterator[object]:
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise UsageError("reading Parquet needs pyarrow", hint="pip install 'trimkv-cli[parquet]'") from error
        try:
            table: Any = ParquetFile(self._stream)
            self._place(table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=[self._column]):
                yield from _cells(batch.column(0))
        except ArrowException as error:
            raise InputError(f"the input is no Parquet file that can be read: {error}") from error

    def _place(self, columns: list[str]) -> int:
        if self._column not in columns:
            named = ", ".join(columns[:8]) or "none"
            raise UsageError(f"there is no column {self._column!r}", hint=f"--prompt-column takes one of: {named}")
        return columns.index(self._column)


def _cells(column: Any) -> list[object]:
    """Return the cells of a Parquet column; bytes that are not UTF-8 are kept, for their own row to be refused."""
    try:
        cells: list[object] = column.to_pylist()
    except UnicodeDecodeError:
        cells = [cell and cell.decode("utf-8", "surrogateescape") for cell in column.cast("binary").to_pylist()]
    return cells
