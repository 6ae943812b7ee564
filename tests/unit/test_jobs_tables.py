"""Mistakes in reading prompts from tables."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.jobs.lines import Rules
from trimkv_cli.jobs.reading import Line, Table, TableReader
from trimkv_cli.jobs.selection import parse_lines


def read(data: bytes, table: Table = "csv", column: str = "prompt") -> list[Line]:
    return list(TableReader(cast(BinaryIO, io.BytesIO(data)), table, column, max_line_bytes=25))


def test_a_csv_row_is_a_line_whatever_its_cells_hold() -> None:
    """Catches rows counted by newlines, a BOM in the first name, and one bad row that ends the reading."""
    data = b'\xef\xbb\xbfn,prompt\r\n1,"two\nlines, and ""more"""\r\n2,\r\n3,\xff\r\n\r\n5,' + b"x" * 26 + b"\r\n6,last"
    assert [(line.number, line.text or line.problem) for line in read(data)] == [
        (1, 'two\nlines, and "more"'),
        (3, "invalid UTF-8"),
        (5, "the prompt is longer than 25 bytes"),
        (6, "last"),
    ]


def test_a_parquet_cell_that_is_not_utf_8_is_one_bad_line(tmp_path: Path) -> None:
    """Catches a byte that ends the whole job with an error of Python's."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffers = pyarrow.array([b"caf\xe9", None, b"ok"], pyarrow.binary()).buffers()
    table: Any = pyarrow.table({"prompt": pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)})
    parquet.write_table(table, tmp_path / "in.parquet")
    lines = read((tmp_path / "in.parquet").read_bytes(), "parquet")
    assert [(line.number, line.text or line.problem) for line in lines] == [(1, "invalid UTF-8"), (3, "ok")]


def test_a_parquet_column_is_read_row_by_row(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table: Any = pyarrow.table({"prompt": ["a", None, "c"] * 200, "number": list(range(600))})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=50)
    data = (tmp_path / "in.parquet").read_bytes()
    assert [(line.number, line.text) for line in read(data, "parquet")][:4] == [(1, "a"), (3, "c"), (4, "a"), (6, "c")]
    assert read(data, "parquet", "number")[0].problem == "column 'number' holds no text, but int"
    with pytest.raises(InputError, match="no Parquet file"):
        read(data[:-9], "parquet")


@pytest.mark.parametrize(
    ("data", "columns"),
    [(b"a,b\r\n1,2\r\n", "a, b"), (b"a;b,c;d\r\n", "a, b,c, d"), (b"a\tb\r\n", "a, b"), (b"", "none")],
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(data: bytes, columns: str) -> None:
    """Catches a header in another delimiter that is told as one long name."""
    with pytest.raises(UsageError, match="no column 'prompt'") as caught:
        read(data)
    assert caught.value.hint == f"--prompt-column takes one of: {columns}"


def stray(rest: str) -> bytes:
    return f'number,prompt\n1,a\n2,"two\nlines"\n3,"5 inch nails?\n4,b\n{rest}'.encode()


@pytest.mark.parametrize(
    ("data", "why"), [(stray("5,c\n"), "a quote is not closed"), (stray('5,"Hello, you"\n'), "it is no CSV")]
)
def test_a_stray_quote_is_told_with_its_row(data: bytes, why: str) -> None:
    """Catches the rest of a file that is taken for one prompt, and answered."""
    rows = iter(TableReader(cast(BinaryIO, io.BytesIO(data)), "csv", "prompt", max_line_bytes=99))
    assert [next(rows).text, next(rows).text] == ["a", "two\nlines"]
    with pytest.raises(InputError, match=f"row 3, which begins in line 5 of the input: {why}") as caught:
        next(rows)
    assert caught.value.hint


def test_a_quote_in_the_middle_of_a_cell_is_a_letter() -> None:
    assert [line.text for line in read(b'n,prompt\n1,a 5" nail\n2,b\n')] == ['a 5" nail', "b"]


def test_a_row_of_another_width_is_a_bad_line_unless_what_is_more_is_empty() -> None:
    """Catches a prompt that is cut at its first comma, and one that is passed over as blank."""
    lines = read(b"n,prompt\n1,Hello, you\n2\n\n4,b,,\n")
    assert [(line.number, line.text or (line.problem or "")[:17]) for line in lines] == [
        (1, "the row has 3 cel"),
        (2, "the row has 1 cel"),
        (4, "b"),
    ]


def test_bytes_that_are_no_text_are_told() -> None:
    assert read(b"n,prompt\n1,a\0b\n")[0].problem == "NUL byte"
    with pytest.raises(InputError, match="UTF-16"):
        read("id,prompt\n1,a\n".encode("utf-16"))


@pytest.mark.parametrize("columns", [b"prompt,prompt", b"id,prompt,id"])
def test_two_columns_of_one_name_are_not_guessed_at(columns: bytes) -> None:
    """Catches the first of two columns taken in silence."""
    with pytest.raises(UsageError, match="2 columns are called"):
        read(columns + b"\na,b,c\n")


@pytest.mark.parametrize(
    ("table", "delimiter"), [("csv", ","), ("csv", ";"), ("csv", "\t"), ("csv", "|"), ("tsv", "\t")]
)
def test_the_delimiter_is_the_one_that_the_header_shows(table: Table, delimiter: str) -> None:
    """Catches spreadsheets' files of half of Europe, which a comma splits nowhere."""
    data = delimiter.join(["id", "prompt"]) + "\n" + delimiter.join(["7", '"a, b; c\td|e"']) + "\n"
    [line] = read(data.encode(), table)
    assert (line.custom_id, line.text) == ("7", "a, b; c\td|e")


def test_a_column_of_a_tsv_may_hold_commas() -> None:
    assert [line.text for line in read(b"prompt\na, b\n", "tsv")] == ["a, b"]


def test_ids_of_rows_are_carried_and_used_but_once() -> None:
    """Catches answers that nobody can match with their rows."""
    data = b"id,prompt,custom_id\n1,a,x\n2,b,\n3,c,x\n"
    lines = TableReader(cast(BinaryIO, io.BytesIO(data)), "csv", "prompt", max_line_bytes=99)
    parsed = list(parse_lines(lines, Rules(text=True)))
    assert [(each.custom_id, getattr(each, "code", None)) for each in parsed] == [
        ("x", None),
        ("line-2", None),
        ("x", "duplicate_custom_id"),
    ]
    assert [line.custom_id for line in read(b"id,prompt\n1,a\n", column="id")] == [None]


def test_ids_of_a_parquet_file_may_be_numbers(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"prompt": ["a", "b", "c"], "id": [1.0, None, 2.5], "z": [1, 2, 3]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    lines = read((tmp_path / "in.parquet").read_bytes(), "parquet")
    assert [(line.custom_id, line.problem and line.problem[:12]) for line in lines] == [
        ("1", None),
        (None, None),
        (None, "the id is no"),
    ]
