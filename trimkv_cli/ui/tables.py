"""Columns of plain text: data that a person reads and a pipe can cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len


def columns(rows: Sequence[Sequence[str]], *, gap: int = 2) -> Iterator[str]:
    """Yield one line per row, every column as wide as its widest cell, the last one unpadded."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell + " " * (width - cell_len(cell)) for cell, width in zip(row[:-1], widths, strict=False)]
        yield (" " * gap).join([*cells, row[-1]])
