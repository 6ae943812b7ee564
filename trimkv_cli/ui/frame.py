"""A block of lines that is drawn over itself at the end of a terminal's scrollback, and leaves nothing behind."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len

_ERASE_BELOW = "\x1b[J"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Frame:
    """Own the last lines of a terminal; the cursor stays visible and stands under the frame.

    Whatever else is to be written there needs `clear` before it. Only for terminals: see `live.may_move`.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._widths: list[int] = []

    @property
    def size(self) -> os.terminal_size:
        """Return columns and lines as they are now; 80 × 24 where the terminal does not say."""
        try:
            columns, lines = os.get_terminal_size(self._stream.fileno())
        except OSError:
            columns = lines = 0
        return os.terminal_size((columns or 80, lines or 24))

    def show(self, lines: Sequence[str]) -> None:
        """Replace the frame; lines beyond the terminal's height are left out, as the cursor cannot go back to them."""
        fitting = lines[: max(0, self.size.lines - 1)]
        self._write(self._back() + "".join(f"{line}\n" for line in fitting))
        self._widths = [cell_len(_COLOURS.sub("", line)) for line in fitting]

    def clear(self) -> None:
        """Take the frame away."""
        if self._widths:
            self._write(self._back())
        self._widths = []

    def forget(self) -> None:
        """Leave what is drawn where it is: somebody else has written since."""
        self._widths = []

    def _back(self) -> str:
        """Return the codes that go back to the frame's first line and erase it."""
        columns, lines = self.size
        rows = sum(-(-width // columns) or 1 for width in self._widths) if _reflows() else len(self._widths)
        return f"\r\x1b[{min(rows, lines - 1)}A{_ERASE_BELOW}" if rows else ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _reflows() -> bool:
    """Say whether the terminal wraps its lines anew when it becomes narrower; nearly all do."""
    terminal = os.environ.get("TERM", "")
    return not ({"XTERM_VERSION", "STY"} & os.environ.keys() or terminal.startswith(("linux", "rxvt")))
