"""Mistakes in cutting long texts and in what is asked of a model."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimkv_cli.commands.summarize.texts import SummaryStyle, as_json, cut
from trimkv_cli.errors import UsageError


@given(st.text(alphabet="ab .\n語", max_size=300), st.integers(1, 60))
def test_parts_fit_and_nothing_is_lost(text: str, room: int) -> None:
    """Catches a part that is too long, and characters that fall between two parts."""
    parts = cut(text, room, len)
    assert "".join(parts) == text
    assert all(len(part) <= room for part in parts)


def test_parts_are_of_about_equal_length_and_end_where_sentences_do() -> None:
    """Catches a last part of two words, and words that are cut although there are better places."""
    text = "The train leaves at noon. " * 100
    parts = cut(text, 1000, len)
    assert len(parts) == 3
    assert max(map(len, parts)) - min(map(len, parts)) < 200
    assert all(part.strip().endswith(".") for part in parts)


def test_the_wish_becomes_an_instruction_and_a_bad_length_is_refused() -> None:
    """Catches flags that change nothing, and a default that the built-in model was not trained on."""
    assert SummaryStyle().instruction() == "Summarize the text above. Keep to what it says; list its main points."
    wished = SummaryStyle(format="bullets", length="120", focus="the cat").instruction()
    assert "120 words" in wished
    assert "the cat" in wished
    assert '"- "' in wished
    assert SummaryStyle(format="prose").instruction() != SummaryStyle().instruction()
    with pytest.raises(UsageError, match="--length huge"):
        SummaryStyle(length="huge")


def test_json_holds_the_points_whatever_marks_them() -> None:
    """Catches output that is no JSON when the model writes something else."""
    line = as_json('a"b.txt', '- one\n\n* two\n3. "three"\nfour - five\n')
    assert json.loads(line) == {"input": 'a"b.txt', "points": ["one", "two", '"three"', "four - five"]}
    assert "\n" not in line
