"""Columns of plain text."""

from __future__ import annotations

from trimkv_cli.ui.plain import columns


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    """Catch ragged columns and trailing spaces."""
    assert list(columns([("a", "bb", "c"), ("aaa", "b", "cc")])) == ["a    bb  c", "aaa  b   cc"]


def test_wide_characters_take_two_cells() -> None:
    """Catch columns aligned by characters, not by cells."""
    assert list(columns([("漢字", "x"), ("abcd", "y")])) == ["漢字  x", "abcd  y"]


def test_no_rows_are_no_lines() -> None:
    """Catch a table that fails on an empty list."""
    assert list(columns([])) == []
