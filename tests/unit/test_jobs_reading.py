"""Mistakes in turning bytes into numbered lines, and in reading ahead."""

from __future__ import annotations

import io
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimkv_cli.errors import InputError
from trimkv_cli.jobs.job import Feed
from trimkv_cli.jobs.reading import Line, LineReader, begins_with_messages, open_input


def read(data: bytes, limit: int = 100) -> list[Line]:
    return list(LineReader(io.BytesIO(data), max_line_bytes=limit))


def test_line_endings_and_a_bom_are_no_part_of_a_line() -> None:
    assert read(b"\xef\xbb\xbfa\r\nb\nc") == [
        Line(number=1, text="a"),
        Line(number=2, text="b"),
        Line(number=3, text="c"),
    ]


def test_blank_lines_are_counted_and_keep_the_numbers_of_the_others_right() -> None:
    reader = LineReader(io.BytesIO(b"\n \t\r\na\n\nb\n"))
    assert [(line.number, line.text) for line in reader] == [(3, "a"), (5, "b")]
    assert reader.blank_lines == 3


def test_a_byte_that_is_no_text_is_named_by_its_place() -> None:
    nul, broken, good = read(b"ab\0c\n\xc3(\ngood\n")
    assert nul.problem == "NUL byte at byte 3"
    assert broken.problem == "invalid UTF-8 at byte 1"
    assert good == Line(number=3, text="good")


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_the_limit_counts_the_line_without_ending_and_bom(ending: bytes, bom: bytes) -> None:
    assert read(bom + b"x" * 100 + ending)[0].problem is None
    assert read(bom + b"x" * 101 + ending)[0].problem == "the line is longer than 100 bytes"


def test_a_line_past_the_limit_is_never_held() -> None:
    class Endless(io.RawIOBase):
        left = 64 << 20

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            count = min(len(buffer), self.left)
            buffer[:count] = b"x" * count
            self.left -= count
            return count

    tracemalloc.start()
    lines = list(LineReader(io.BufferedReader(Endless()), max_line_bytes=1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [line.problem for line in lines] == ["the line is longer than 1,000 bytes"]
    assert peak < 8 << 20


@given(st.binary(max_size=400), st.integers(1, 40))
def test_any_bytes_give_one_line_or_one_problem_each(data: bytes, limit: int) -> None:
    """The oracle holds everything and splits at newlines; only the size limit is left to the reader."""
    pieces = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [n for n, piece in enumerate(pieces, 1) if piece.removesuffix(b"\r").strip() or len(piece) > limit]
    lines = read(data, limit)
    assert [line.number for line in lines if line.problem is None] == [
        n for n in expected if _is_text(pieces[n - 1].removesuffix(b"\r"), limit)
    ]
    for line in lines:
        if line.problem is None:
            assert line.text.encode() == pieces[line.number - 1].removesuffix(b"\r")


def _is_text(piece: bytes, limit: int) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in piece and len(piece) <= limit


@pytest.mark.parametrize("name", ["absent.jsonl", "."])
def test_an_input_that_cannot_be_read_says_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        open_input(str(tmp_path / name))
    assert caught.value.hint


def test_a_source_that_waits_holds_nobody_up() -> None:
    gate = threading.Event()

    def source() -> Iterator[int]:
        yield 1
        gate.wait(10)
        yield 2

    with Feed(source()) as feed:
        assert feed.take(wait_s=5) == 1
        assert feed.take() is None
        assert not feed.exhausted
        gate.set()
        assert feed.take(wait_s=5) == 2
        assert feed.take(wait_s=5) is None
        assert feed.exhausted


def test_a_read_that_never_ends_does_not_hold_up_the_end_of_a_job() -> None:
    """Closing a pipe that another thread reads from would wait for that read."""
    read_fd, write_fd = os.pipe()
    with Feed(LineReader(os.fdopen(read_fd, "rb"))) as feed:
        started = time.monotonic()
        assert feed.take(wait_s=0.1) is None
    assert time.monotonic() - started < 5
    os.close(write_fd)


def test_a_feed_reads_no_further_ahead_than_told() -> None:
    read_so_far: list[int] = []

    def source() -> Iterator[int]:
        for number in range(1000):
            read_so_far.append(number)
            yield number

    with Feed(source(), ahead=4) as feed:
        for _ in range(10):
            feed.take(wait_s=5)
    assert len(read_so_far) <= 10 + 4 + 1


def test_what_the_source_raises_comes_out_where_items_are_taken() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise InputError("disk gone")

    with Feed(source()) as feed:
        assert feed.take(wait_s=5) == 1
        with pytest.raises(InputError, match="disk gone"):
            feed.take(wait_s=5)


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-8"])
def test_lines_in_another_encoding(encoding: str, tmp_path: Path) -> None:
    """Catches lines cut in the middle of a character, and a byte order mark in the first."""
    path = tmp_path / "in.txt"
    path.write_bytes("我的猫\nsecond 波\n".encode(encoding))
    stream = open_input(str(path), encoding=encoding)
    assert [line.text for line in LineReader(stream, encoding=encoding)] == ["我的猫", "second 波"]


def test_a_byte_that_the_encoding_does_not_have_is_the_fault_of_its_line(tmp_path: Path) -> None:
    """Catches bytes that are taken for UTF-8 although another encoding was named, and a line without its reason."""
    path = tmp_path / "in.txt"
    path.write_bytes("one\ntwo é\nthree\n".encode())
    lines = list(LineReader(open_input(str(path), encoding="ascii"), encoding="ascii"))
    assert [line.text or line.problem for line in lines] == ["one", "not ascii after 4 letters", "three"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'\n {"messages": []}\n{"prompt": "a"}', True),
        (b'{"url": "/v1/chat/completions", "body": {"messages": []}}', True),
        (b'\xef\xbb\xbf{"prompt": "\\"messages\\""}\n{"messages": []}', False),
        (b'{"messages": "' + b"x" * (1 << 16), True),
        (b"", False),
        (b"[1]", False),
    ],
)
def test_it_is_known_whether_an_input_begins_with_messages(line: bytes, found: bool) -> None:
    """Catches a job that is refused for a template that it does not need, and lines that are lost by looking."""
    stream = io.BufferedReader(cast(Any, io.BytesIO(line)))
    assert begins_with_messages(stream) is found
    assert stream.read() == line
