"""Mistakes in reading prompts from tables."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.jobs.reading import Line
from trimkv_cli.jobs.tables import Table, TableReader


def read(data: bytes, table: Table = "csv", column: str = "prompt") -> list[Line]:
    return list(TableReader(cast(BinaryIO, io.BytesIO(data)), table, column, max_line_bytes=25))


def test_a_csv_row_is_a_line_whatever_its_cells_hold() -> None:
    """Catches rows counted by newlines, a BOM in the first name, and one bad row that ends the reading."""
    data = (
        b'\xef\xbb\xbfid,prompt\r\n1,"two\nlines, and ""more"""\r\n2,\r\n3,\xff\r\n4\r\n5,' + b"x" * 26 + b"\r\n6,last"
    )
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


@pytest.mark.parametrize("data", [b"a,b\r\n1,2\r\n", b""])
def test_a_column_that_is_not_there_is_named_with_those_that_are(data: bytes) -> None:
    with pytest.raises(UsageError, match="no column 'prompt'") as caught:
        read(data)
    assert caught.value.hint
