"""The standard streams and signals of the process, and a clock for what is said now and then."""

from __future__ import annotations

import codecs
import errno
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from io import TextIOWrapper
from types import TracebackType
from typing import Any, Literal

_PATIENCE_S = 2.0
_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF}


def repair_streams() -> None:
    """Stand something in for streams that are closed: nothing to read, a stdout that refuses, a stderr that swallows.

    Without that the next file opened would become stdout, and what is said on stderr would be printed on stdout.
    """
    if sys.stdin is None:
        sys.stdin = _reopen(0, os.O_RDONLY, "r")
    if sys.stdout is None:
        sys.stdout = _reopen(1, os.O_RDONLY, "w")  # not open for writing: whoever answers there is told
    if sys.stderr is None:
        sys.stderr = _reopen(2, os.O_WRONLY, "w")
    if isinstance(sys.stdout, TextIOWrapper):
        codecs.register_error("trimkv", _as_utf8)
        sys.stdout.reconfigure(errors="trimkv")


def say_if_nothing_comes(say: Callable[[str], None]) -> threading.Thread:
    """Say, two seconds from now, that stdin is waited for, unless something can be read from it by then."""
    watching = threading.Thread(target=_watch_stdin, args=(say,), daemon=True)
    watching.start()
    return watching


def _watch_stdin(say: Callable[[str], None]) -> None:
    try:
        number = sys.stdin.fileno()
        ready, _, _ = select.select([number], [], [], _PATIENCE_S)
    except (OSError, ValueError):
        return  # no descriptor, or none that can be watched
    if not ready:
        typed = os.isatty(number)
        say(f"waiting for stdin ({'type, then Ctrl-D' if typed else 'a pipe without data; </dev/null gives it none'})")


def why_not_written(error: OSError) -> str | None:
    """Say why something could not be written, or None when the error is about something else."""
    if error.errno not in _CANNOT_WRITE:
        return None
    if error.errno == errno.EBADF:
        return "stdout is closed"
    return f"cannot write: {os.strerror(error.errno)}"


def drop_stdout() -> None:
    """Let what stdout still holds go nowhere, so that the interpreter's own flush at exit cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _as_utf8(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write in UTF-8 what a stream's own encoding does not have, and bytes in a file's name as they are."""
    assert isinstance(error, UnicodeEncodeError)
    return error.object[error.start : error.end].encode("utf-8", "surrogateescape"), error.end


def _reopen(number: int, flags: int, mode: Literal["r", "w"]) -> TextIOWrapper:
    opened = os.open(os.devnull, flags)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
    return open(number, mode, encoding="utf-8", closefd=False)  # a number is no path


class Interrupts:
    """Note the first of some signals while entered, so that nothing is left half done; the second ends the process."""

    def __init__(self, *numbers: signal.Signals, on_first: Callable[[], None] = lambda: None) -> None:
        self._numbers = numbers or (signal.SIGINT, signal.SIGTERM)
        self._on_first = on_first
        self._noted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._note) for number in self._numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def noted(self) -> bool:
        """Say whether there was one since `clear`."""
        return self._noted

    def clear(self) -> None:
        """Forget what was noted."""
        self._noted = False

    def _note(self, number: int, _: object) -> None:
        if not self._noted:
            self._noted = True
            self._on_first()
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


class Every:
    """A clock that is due once in so many seconds, for the first time after these or `at_once`."""

    def __init__(self, seconds: float, *, at_once: bool = False) -> None:
        self._seconds = seconds
        self._next = 0.0 if at_once else time.monotonic() + seconds

    def due(self) -> bool:
        """Say whether it is time; the next interval begins then."""
        if (now := time.monotonic()) < self._next:
            return False
        self._next = now + self._seconds
        return True

    def hurry(self) -> None:
        """Be due now."""
        self._next = 0.0
