"""A terminal with a `trimkv` in it: keys in, a screen out."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pexpect
import pyte

from helpers.programs import COMMAND, ENVIRONMENT

ENTER, NEWLINE, CTRL_C, CTRL_D, TAB = "\r", "\n", "\x03", "\x04", "\t"


class _Answering(pyte.HistoryScreen):
    """A screen that answers when it is asked where its cursor is."""

    reply: Callable[[str], Any] = staticmethod(lambda _: None)

    def write_process_input(self, data: str) -> None:
        self.reply(data)


class Terminal:
    """Run one command; everything it has shown is in `text`, what stands on the screen in `lines`."""

    def __init__(
        self,
        *arguments: str | Path,
        home: Path,
        width: int = 80,
        height: int = 40,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        places = {f"XDG_{kind}_HOME": str(home / kind.lower()) for kind in ("DATA", "STATE", "CONFIG", "CACHE")}
        self.screen = _Answering(width, height, history=5000, ratio=1.0)
        self._stream = pyte.ByteStream(self.screen)
        self.process = pexpect.spawn(
            COMMAND[0],
            [*COMMAND[1:], *map(str, arguments)],
            env={**ENVIRONMENT, **places, "TERM": "xterm-256color", **(environment or {})},
            dimensions=(height, width),
            echo=False,
            timeout=240,
        )
        self.process.delaybeforesend = None
        self.screen.reply = self.process.send
        self.raw = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.close(force=True)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self) -> str:
        """Everything above and on the screen."""
        above = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top]
        return "\n".join([*(line.rstrip() for line in above), *self.lines])

    def type(self, keys: str) -> None:
        self.process.send(keys)

    def paste(self, text: str) -> None:
        self.type(f"\x1b[200~{text}\x1b[201~")

    def send(self, text: str) -> None:
        """Type a line, press Enter, and wait for the next prompt."""
        before = self.prompts
        self.type(text + ENTER)
        self.wait(lambda: self.prompts > before and self.asks)

    @property
    def prompts(self) -> int:
        return sum(line.startswith(">") for line in self.text.split("\n"))

    @property
    def asks(self) -> bool:
        """Say whether an empty input line waits."""
        return self.lines[self.screen.cursor.y] == ">"

    def wait(self, done: Callable[[], bool] | str, *, within_s: float = 240.0) -> None:
        """Read what comes until a condition holds, or a text stands on the screen."""
        condition = done if callable(done) else lambda: done in self.text
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, self.text
            self._read()

    def wait_end(self) -> int:
        """Read to the end and return the exit code."""
        try:
            while True:
                self._read()
        except pexpect.EOF:
            self.process.close()
        assert self.process.exitstatus is not None, self.process.signalstatus
        return int(self.process.exitstatus)

    def resize(self, width: int, height: int) -> None:
        self.screen.resize(height, width)
        self.process.setwinsize(height, width)

    def kill(self) -> None:
        self.process.kill(signal.SIGKILL)
        self.process.wait()

    def _read(self) -> None:
        try:
            piece = self.process.read_nonblocking(65536, timeout=0.1)
        except pexpect.TIMEOUT:
            return
        self.raw += piece
        self._stream.feed(piece)
