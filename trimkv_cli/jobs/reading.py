"""Turns an input into numbered lines, holding one line at a time."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson

from trimkv_cli.errors import InputError
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
