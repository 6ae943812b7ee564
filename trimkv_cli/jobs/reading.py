"""An input as numbered lines, of which one at a time is held."""

from __future__ import annotations

import codecs
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, cast

import orjson

from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.jobs.packing import Unpacked, packing_of

MAX_LINE_BYTES = 16 << 20
_BOM = b"\xef\xbb\xbf"
_SLACK = len(_BOM) + len("\r\n") + 1  # read so much past the limit to know that a line is too long
_PEEK_BYTES = 1 << 14
_MARK = "trimkv.mark"
_DRAIN_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line that is not blank; `problem` says why `text` cannot be used."""

    number: int  # counted from 1, blank lines included
    text: str = ""
    custom_id: str | None = None  # of a table's row
    problem: str | None = None


def open_input(source: str, *, encoding: str | None = None) -> BinaryIO:
    """Open a file, or stdin for "-", for reading UTF-8, which an `encoding` is turned into; packed ones are unpacked.

    Raises:
        InputError: the file cannot be read.
    """
    stream = _open(source)
    if encoding is None or codecs.lookup(encoding).name == "utf-8":
        return stream
    return cast(BinaryIO, io.BufferedReader(_InUtf8(stream, encoding)))


def _open(source: str) -> BinaryIO:
    if source == "-":
        # A reader of our own: sys.stdin's lock, held by a blocked thread, would abort the interpreter at exit.
        return open(sys.stdin.fileno(), "rb", closefd=False)
    try:
        stream = Path(source).open("rb")  # noqa: SIM115  whoever iterates closes it
    except OSError as error:
        raise InputError(
            f"cannot read {source}: {error.strerror}", hint='give a JSONL file, or "-" for stdin'
        ) from error
    packing = packing_of(source)
    if packing is None:
        return stream
    return cast(BinaryIO, io.BufferedReader(Unpacked(stream, packing, source)))


def begins_with_messages(stream: BinaryIO) -> bool:
    """Tell whether the first line holds messages, without taking anything from the stream."""
    peek = getattr(stream, "peek", None)
    first: bytes = b"" if peek is None else peek(_PEEK_BYTES).removeprefix(_BOM).lstrip().partition(b"\n")[0]
    try:
        line = orjson.loads(first)
    except orjson.JSONDecodeError:  # cut off, or no JSON at all
        return b'"messages"' in first
    body = line.get("body", line) if isinstance(line, dict) else {}
    return isinstance(body, dict) and "messages" in body


class _InUtf8(io.RawIOBase):
    """Hand a stream on in UTF-8; a byte that its encoding does not have becomes one that no UTF-8 has, in its line."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        codecs.register_error(_MARK, lambda error: ("\ud800", error.end))  # type: ignore[attr-defined]
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(_MARK)
        self._ready = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            block = read_some(self._stream, io.DEFAULT_BUFFER_SIZE)
            self._ended = not block
            self._ready = self._decoder.decode(block, final=not block).encode("utf-8", "surrogatepass")
        piece, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._stream.close()
        super().close()


def read_some(stream: BinaryIO, most: int) -> bytes:
    """Read what is there, at least one byte before the end, without waiting for more."""
    read1 = getattr(stream, "read1", None)
    return read1(most) if read1 is not None else stream.read(most)


class LineReader:
    """Iterate, once, over the lines of `stream`; a line longer than `max_line_bytes` is passed over, not held.

    Whoever iterates also closes the stream: closing it from another thread would wait for a read that may never end.
    """

    def __init__(self, stream: BinaryIO, *, max_line_bytes: int = MAX_LINE_BYTES, encoding: str | None = None) -> None:
        self.blank_lines = 0
        self._stream = stream
        self._limit = max_line_bytes
        self._encoding = encoding

    def __iter__(self) -> Iterator[Line]:
        number = 0
        with self._stream:
            while raw := self._read():
                number += 1
                line = _line(number, raw.removeprefix(_BOM) if number == 1 else raw, self._limit, self._encoding)
                if line is None:
                    self.blank_lines += 1
                else:
                    yield line

    def _read(self) -> bytes:
        """Return the next line with its ending, cut off just past the limit; b"" at the end."""
        try:
            raw = self._stream.readline(self._limit + _SLACK)
            rest = raw
            while len(rest) > 0 and not rest.endswith(b"\n"):
                rest = self._stream.readline(_DRAIN_BYTES)
        except OSError as error:
            raise InputError(f"cannot read the input any further: {error.strerror}") from error
        return raw


def _line(number: int, raw: bytes, limit: int, encoding: str | None) -> Line | None:
    data = raw.removesuffix(b"\n").removesuffix(b"\r")
    if len(data) > limit:
        return Line(number=number, problem=f"the line is longer than {limit:,} bytes")
    if not data.strip():
        return None
    if (nul := data.find(b"\0")) >= 0:
        return Line(number=number, problem=f"NUL byte at byte {nul + 1}")
    try:
        return Line(number=number, text=data.decode("utf-8"))
    except UnicodeDecodeError as error:
        before = len(data[: error.start].decode("utf-8"))
        said = (
            f"invalid UTF-8 at byte {error.start + 1}" if encoding is None else f"not {encoding} after {before} letters"
        )
        return Line(number=number, problem=said)


Table = Literal["csv", "tsv", "parquet"]

_BATCH_ROWS = 256
_DELIMITERS = {"csv": ",;\t|", "tsv": "\t"}
_ID_COLUMNS = ("custom_id", "id")
_QUOTES = 'a quote inside a quoted cell is written twice: "a 5"" nail"'


class TableReader:
    """Iterate, once, over the rows as lines, numbered from 1 below the header; a column `custom_id` or `id` names them.

    A CSV's delimiter is the one that makes a header with the wanted column.
    """

    def __init__(self, stream: BinaryIO, table: Table, column: str, *, max_line_bytes: int) -> None:
        self.blank_lines = 0
        self._stream = stream
        self._table = table
        self._column = column
        self._limit = max_line_bytes

    def __iter__(self) -> Iterator[Line]:
        with self._stream:
            rows = self._parquet_rows() if self._table == "parquet" else self._csv_rows()
            for number, (cell, row_id) in enumerate(rows, 1):
                line = self._line(number, cell, row_id)
                if line is None:
                    self.blank_lines += 1
                else:
                    yield line

    def _line(self, number: int, cell: object, row_id: object) -> Line | None:
        if isinstance(cell, _Bad):
            return Line(number=number, problem=str(cell))
        if cell is None or cell == "":
            return None
        if not isinstance(cell, str):
            return Line(number=number, problem=f"column {self._column!r} holds no text, but {type(cell).__name__}")
        custom_id, problem = _id(row_id)
        problem = problem or _problem(cell) or (_problem(custom_id) if custom_id else None)
        if problem is None and len(cell.encode()) > self._limit:
            problem = f"the prompt is longer than {self._limit:,} bytes"
        if problem is not None:
            return Line(number=number, problem=problem)
        return Line(number=number, text=cell, custom_id=custom_id)

    def _csv_rows(self) -> Iterator[tuple[object, object]]:
        csv.field_size_limit(max(self._limit * 4, 1 << 17))
        text = io.TextIOWrapper(self._stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        header = _read_header(text)
        columns, delimiter = self._columns(header)
        place, id_place = self._place(columns), self._id_place(columns)
        before = header.count("\n")
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        number, begins = 0, 0
        try:
            for row in rows:
                number, begins = number + 1, rows.line_num
                if problem := _width_problem(row, len(columns)):
                    yield _Bad(problem), None
                else:
                    yield (row[place], None if id_place is None else row[id_place]) if row else (None, None)
        except csv.Error as error:
            why = "a quote is not closed" if "unexpected end" in str(error) else f"it is no CSV: {error}"
            where = f"row {number + 1}, which begins in line {before + begins + 1} of the input"
            raise InputError(f"{where}: {why}", hint=_QUOTES) from error

    def _columns(self, header: str) -> tuple[list[str], str]:
        """Split the header by the first delimiter that yields the wanted column, else by the one that yields most."""
        split = [(_split(header, delimiter), delimiter) for delimiter in _DELIMITERS[self._table]]
        found = next((each for each in split if self._column in each[0]), None)
        return found or max(split, key=lambda each: len(each[0]))

    def _parquet_rows(self) -> Iterator[tuple[object, object]]:
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise UsageError("reading Parquet needs pyarrow", hint="pip install 'trimkv-cli[parquet]'") from error
        try:
            table: Any = ParquetFile(self._stream)
            names = table.schema_arrow.names
            self._place(names)
            id_place = self._id_place(names)
            wanted = [self._column] if id_place is None else [self._column, names[id_place]]
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
                columns = [_cells(batch.column(name)) for name in wanted]
                yield from zip(columns[0], columns[-1] if len(wanted) > 1 else [None] * len(columns[0]), strict=True)
        except ArrowException as error:
            raise InputError(f"the input is no Parquet file that can be read: {error}") from error

    def _place(self, columns: Sequence[str]) -> int:
        if "\0" in "".join(columns):
            raise InputError("the header holds NUL bytes: is the input UTF-16?", hint="save it as UTF-8")
        if self._column not in columns:
            named = ", ".join(columns[:8]) or "none"
            raise UsageError(f"there is no column {self._column!r}", hint=f"--prompt-column takes one of: {named}")
        return _only(columns, self._column)

    def _id_place(self, columns: Sequence[str]) -> int | None:
        name = next((name for name in _ID_COLUMNS if name in columns and name != self._column), None)
        return None if name is None else _only(columns, name)


class _Bad(str):
    """Say in place of a cell what is wrong with its row."""

    __slots__ = ()


def _only(columns: Sequence[str], name: str) -> int:
    if columns.count(name) > 1:
        raise UsageError(f"{columns.count(name)} columns are called {name!r}", hint="rename all but one of them")
    return columns.index(name)


def _read_header(text: TextIO) -> str:
    """Read the header, which goes on as long as a quote is open."""
    header = text.readline()
    while header.count('"') % 2 and (more := text.readline()):
        header += more
    return header


def _split(header: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader(io.StringIO(header, newline=""), delimiter=delimiter), [])]
    except csv.Error:
        return []


def _width_problem(row: list[str], width: int) -> str | None:
    """Say what is wrong with a row of another width than the header; spreadsheets add empty cells at the end."""
    if not row or len(row) == width or (len(row) > width and not any(row[width:])):
        return None
    cells = "1 cell" if len(row) == 1 else f"{len(row)} cells"
    return f"the row has {cells}, and the header {width}: text with a delimiter or a newline needs quotes"


def _id(value: object) -> tuple[str | None, str | None]:
    """Return a row's id, if it has one, and what is wrong with it."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if value is None or value == "" or value != value:  # noqa: PLR0124  NaN stands for nothing in pandas
        return None, None
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None, f"the id is no text and no whole number, but {type(value).__name__}"
    return str(value), None


def _problem(text: str) -> str | None:
    if any("\udc80" <= character <= "\udcff" for character in text):
        return "invalid UTF-8"
    return "NUL byte" if "\0" in text else None


def _cells(column: Any) -> list[object]:
    """Return the cells of a Parquet column; bytes that are not UTF-8 are kept, for their own row to be refused."""
    try:
        cells: list[object] = column.to_pylist()
    except UnicodeDecodeError:
        cells = [cell and cell.decode("utf-8", "surrogateescape") for cell in column.cast("binary").to_pylist()]
    return cells
