"""Plain output: answers, errors and columns, in which no character of a model or a file can drive the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from io import FileIO
from typing import Any, BinaryIO

from rich.cells import cell_len

from trimkv_cli.files import replaced, writing

# C0 and DEL become their control pictures, C1 (which some terminals obey) the replacement character; newline and tab
# stay.
_SAFE = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def neutralise(text: str) -> str:
    """Replace control characters except newline and tab by visible ones, and so what is not UTF-8 in a file's name."""
    return replaced(text).translate(_SAFE)


def to_json(value: Any) -> str:
    """Write JSON in ASCII without a control character: they stay what they are, escaped."""
    return json.dumps(value).replace("\x7f", "\\u007f")


class AnswerWriter:
    """Write an answer to stdout or a file as it comes: UTF-8, neutralised, flushed per piece, ended by one newline."""

    def __init__(self, stream: BinaryIO | FileIO | None = None, name: str | None = None) -> None:
        self._stream = sys.stdout.buffer if stream is None else stream
        self._name = name
        self._held_newlines = ""

    def push(self, piece: str) -> None:
        """Write a piece; newlines at its end wait until more text follows."""
        text = self._held_newlines + neutralise(piece)
        body = text.rstrip("\n")
        self._held_newlines = text[len(body) :]
        if body:
            self._write(body)

    def line(self, text: str) -> None:
        """Write a whole line at once, for output that ends with its last line."""
        self._write(f"{neutralise(text)}\n")

    def close(self) -> None:
        """End the answer with exactly one newline."""
        self._held_newlines = ""
        self._write("\n")

    def _write(self, text: str) -> None:
        rest = memoryview(text.encode("utf-8", "replace"))
        with nullcontext() if self._name is None else writing(self._name):
            while rest:
                rest = rest[self._stream.write(rest) :]
            self._stream.flush()


def print_answer(text: str) -> None:
    """Print a whole text on stdout as an answer is printed."""
    writer = AnswerWriter()
    writer.push(text)
    writer.close()


def print_error(message: str, hint: str | None) -> None:
    _say(f"error: {message}")
    if hint:
        _say(f"hint: {hint}")


def print_warning(message: str) -> None:
    _say(f"warning: {message}")


def print_note(message: str) -> None:
    _say(message)


def _say(line: str) -> None:
    print(neutralise(line), file=sys.stderr, flush=True)


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield one line per row, every column as wide as its widest cell, the last one unpadded."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell + " " * (width - cell_len(cell)) for cell, width in zip(row[:-1], widths, strict=False)]
        yield "  ".join([*cells, row[-1]])
