"""Catches sizes and times read in the wrong unit, and bad ones that pass."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trimkv_cli.errors import UsageError
from trimkv_cli.units import (
    Budget,
    SequenceBytes,
    format_size,
    format_sizes,
    parse_budget,
    parse_duration,
    parse_kv_budget,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("512MB", 512_000_000),
        ("4G", 4 * 2**30),
        ("1024", 1024),
        ("1024B", 1024),
        ("1.5 gib", 3 * 2**29),
        ("0.1KB", 100),
        ("2T", 2 * 2**40),
    ],
)
def test_sizes_are_read_in_their_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "8 GiBs", "-1", "GiB", "8ib", "1e9", "8 G B", "٣", "∞", "8,5GiB"])
def test_a_bad_size_is_a_usage_error_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as caught:
        parse_size(text)
    assert "8GiB" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (3 * 2**29, "1.5 GiB"),
    ],
)
def test_sizes_are_written_in_the_fitting_unit(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.lists(st.integers(min_value=0, max_value=2**60), min_size=2, max_size=3))
@example([1_363_148_800, 1_369_439_921])
@example([2**50 + 1, 2**50])
def test_sizes_that_are_compared_look_as_different_as_they_are(sizes: list[int]) -> None:
    """Catches "1.3 GiB are needed, and the budget is 1.3 GiB"."""
    written = format_sizes(*sizes)
    assert len(set(written)) == len(set(sizes))
    assert [parse_size(text) for text in written] == [pytest.approx(size, rel=0.051) for size in sizes]


@given(st.integers(min_value=0, max_value=2**60))
def test_what_is_written_can_be_read(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= size * 0.051


def test_budgets() -> None:
    assert parse_budget("6GiB").resolve() == 6 * 2**30
    assert parse_budget("80%").resolve(total_bytes=1000) == 800
    assert parse_budget("free-1KiB").resolve(free_bytes=4096) == 3072
    assert parse_budget("auto") == Budget(kind="auto")
    assert parse_budget("auto").resolve() is None


@pytest.mark.parametrize("text", ["0", "0%", "101%", "most", "free-", "%"])
def test_a_bad_budget_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_budget(text)


def test_a_share_of_an_unknown_device_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="unknown size"):
        parse_budget("80%").resolve()


def test_a_share_that_leaves_nothing_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no memory"):
        parse_budget("free-8GiB").resolve(free_bytes=2**30)


def test_a_bare_kv_budget_is_slots_and_one_with_a_unit_bytes() -> None:
    assert parse_kv_budget("512") == 512
    assert parse_kv_budget("256MiB") == SequenceBytes(amount=256 * 2**20)
    assert parse_kv_budget("512B") == SequenceBytes(amount=512)


@pytest.mark.parametrize("text", ["0", "0MiB", "many", "-4"])
def test_a_kv_budget_that_keeps_nothing_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_kv_budget(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("0", 0), ("0.5s", 0.5), ("1h30m", 5400), ("2d", 172_800), ("1H1", 3601)],
)
def test_a_time_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "10 apples", "-1s", "5ms", "1m1h", "1e3"])
def test_what_is_no_time_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_duration(text)
    assert "1h30m" in (caught.value.hint or "")
