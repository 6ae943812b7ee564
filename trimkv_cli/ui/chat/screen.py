"""The terminal of a conversation: scrollback that never changes, and one passing line below it."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from shutil import get_terminal_size
from typing import BinaryIO

from rich.cells import cell_len, set_cell_size

from trimkv_cli.ui.look import Look
from trimkv_cli.ui.plain import neutralise, print_error, print_note
from trimkv_cli.units import format_size, format_sizes


class Screen:
    """Print downwards, with one passing line at the bottom; without `moves` there is no such line."""

    def __init__(self, look_now: Callable[[], Look], *, moves: bool, stream: BinaryIO | None = None) -> None:
        self._look_now = look_now
        self._stream = sys.stdout.buffer if stream is None else stream
        self._passing = ""
        self.moves = moves

    @property
    def look(self) -> Look:
        """Return how to draw now: the terminal may have changed its size."""
        return self._look_now()

    def print(self, text: str = "", *, end: str = "\n") -> None:
        """Print text that has been neutralised already."""
        self._write(self._erased() + text + end)

    def note(self, message: str) -> None:
        self._write(self._erased())
        print_note(message)

    def error(self, message: str, hint: str | None = None) -> None:
        self._write(self._erased())
        print_error(message, hint)

    def passing(self, line: str) -> None:
        """Show a line until something is printed or another one comes."""
        if self.moves:
            line = set_cell_size(line, min(cell_len(line), max(1, get_terminal_size().columns - 1)))
            self._write(self._erased() + line)
            self._passing = line

    def copy(self, text: str) -> bool:
        """Hand text to the terminal's clipboard (OSC 52); False where stdout is no terminal that obeys codes."""
        if not sys.stdout.isatty() or os.environ.get("TERM") in {"dumb", None}:
            return False
        import base64

        self._write(f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\x07")
        return True

    def _erased(self) -> str:
        """Return what erases the passing line, which may have been wrapped since by a narrower terminal."""
        if not self._passing:
            return ""
        above = math.ceil(cell_len(self._passing) / max(1, get_terminal_size().columns)) - 1
        self._passing = ""
        return "\r" + (f"\x1b[{above}A" if above > 0 else "") + "\x1b[J"

    def _write(self, text: str) -> None:
        if text:
            self._stream.write(text.encode("utf-8", "replace"))
            self._stream.flush()


def may_move() -> bool:
    """Say whether stdout is a terminal on which a line may come and go."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def keys_held_back() -> Iterator[None]:
    """Let keys pressed meanwhile neither show nor count: they wait, as they are, for the next prompt. Ctrl-C works."""
    try:
        import termios
    except ImportError:  # not a Unix: keys show
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = termios.tcgetattr(sys.stdin)
    quiet[0] &= ~termios.ICRNL  # Enter stays Enter: a newline would be Ctrl-J
    quiet[3] &= ~(termios.ECHO | termios.ICANON)

    def hold(*_: object) -> None:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)

    hold()
    on_continue = signal.signal(signal.SIGCONT, hold)  # after Ctrl-Z the terminal is as the shell left it
    try:
        yield
    finally:
        signal.signal(signal.SIGCONT, on_continue)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What the line says; None = not known yet."""

    model: str
    kept: int
    seen: int
    slots: int
    horizon: int | None = None  # median age, in tokens, of what is kept
    tps: float | None = None
    budget_bytes: int | None = None
    peak_bytes: int = 0
    attached: int = 0  # files that go with the next message
    must_reread: bool = False


def status_line(status: Status, look: Look) -> str:
    """Return the line, its last facts left out where the width does not hold them; never wider than it."""
    facts = list(_facts(status))
    while len(facts) > 1 and cell_len(look.dot.join(facts)) >= look.width:
        facts.pop()
    return look.dot.join(facts)


def _facts(status: Status) -> list[str]:
    facts = [f"kept {status.kept:,}/{status.seen:,}", f"M {status.slots:,}"]
    if status.must_reread:
        facts = ["to be read again"]
    if status.attached:
        facts.append(f"+{status.attached} file{'s' if status.attached > 1 else ''}")
    if status.budget_bytes is not None:
        facts.append(" of ".join(format_sizes(status.peak_bytes, status.budget_bytes)))
    else:
        facts.append(f"{format_size(status.peak_bytes)}, no budget")
    if status.horizon is not None:
        facts.append(f"horizon {status.horizon:,}")
    if status.tps is not None:
        facts.append(f"{status.tps:.1f} tok/s")
    return [*facts, neutralise(status.model)]
