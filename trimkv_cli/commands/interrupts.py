"""Ctrl-C outside of the input line: noted the first time, so that nothing is left half done."""

from __future__ import annotations

import signal
from types import TracebackType
from typing import Any


class Interrupts:
    """Note Ctrl-C while entered; inside a step it would leave some layers a token ahead of others.

    The second press since `clear` does not wait: it raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self._pressed = False
        self._before: Any = None

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def pressed(self) -> bool:
        """Say whether Ctrl-C was pressed since `clear`."""
        return self._pressed

    def clear(self) -> None:
        """Forget what was pressed."""
        self._pressed = False

    def _note(self, *_: object) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True
