"""Live displays on stderr: a panel that is redrawn, or a line now and then where nothing may move."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from trimkv_cli.streams import Every
from trimkv_cli.ui.look import Look
from trimkv_cli.ui.panel import PanelState, draw_panel, progress_line

_ERASE_BELOW = "\x1b[J"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class LiveRegion:
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


_PANEL_EVERY_S = 1.0
_LINE_EVERY_S = 10.0
_DRAWN_EVERY_S = 0.25


def may_move() -> bool:
    """Say whether stderr is a terminal that may be redrawn."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and "CI" not in os.environ


def print_line(text: str) -> None:
    """Print a line of progress on stderr, as it is."""
    print(text, file=sys.stderr, flush=True)


class Watch:
    """Show how work goes; this one shows nothing.

    Call `tick` after every step: unless something is due it only reads a clock. What is written to the terminal
    meanwhile goes inside `aside`.
    """

    def tick(self) -> None:
        """Show the present state if it is time to."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Make room for other output, which ends its line."""
        yield

    def end(self) -> None:
        """Show nothing more: what follows does not end its lines."""


class Lines(Watch):
    """Write a line whenever the clock is due: every ten seconds, where nothing else is said."""

    def __init__(self, write: Callable[[str], None], say: Callable[[], str], every: Every | None = None) -> None:
        self._write = write
        self._say = say
        self._every = every or Every(_LINE_EVERY_S)

    def tick(self) -> None:
        if self._every.due():
            self._write(self._say())


class Panel(Watch):
    """Redraw a panel once a second at the end of the terminal."""

    def __init__(
        self,
        stream: TextIO,
        ask: Callable[[], PanelState],
        *,
        ascii_only: bool = False,
        every_s: float = _PANEL_EVERY_S,
    ) -> None:
        self._stream = stream
        self._ask = ask
        self._ascii = ascii_only
        self._every = Every(every_s, at_once=True)
        self._before: PanelState | None = None
        self._ended = False
        self._frame = LiveRegion(stream)

    def tick(self) -> None:
        if self._ended or not self._every.due():
            return
        progress = self._ask()
        look = Look.of(self._stream, ascii_only=self._ascii, width=self._frame.size.columns)
        self._frame.show(draw_panel(progress, self._before, look))
        self._before = progress

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the panel away while something else is written; the next tick draws it again."""
        self._frame.clear()
        try:
            yield
        finally:
            self._every.hurry()

    def stop_and_go_on(self, number: int, _: FrameType | None) -> None:
        """Leave a clean terminal to the shell on Ctrl-Z, and draw anew after `fg`."""
        self._frame.clear()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # stopped here, until SIGCONT
        signal.signal(number, self.stop_and_go_on)
        self._frame.forget()
        self._every.hurry()

    def end(self) -> None:
        self._ended = True
        self._frame.clear()


@contextmanager
def open_watch(
    ask: Callable[[], PanelState], *, wanted: bool | None, quiet: bool, ascii_only: bool = False
) -> Iterator[Watch]:
    """Watch work on stderr: a panel on a terminal unless `wanted` is False, else lines unless `quiet`."""
    if quiet and not wanted:
        yield Watch()
        return
    if wanted is False or not may_move():
        yield Lines(print_line, lambda: progress_line(ask()))
        return
    panel, suspends = Panel(sys.stderr, ask, ascii_only=ascii_only), getattr(signal, "SIGTSTP", None)
    before = signal.signal(suspends, panel.stop_and_go_on) if suspends is not None else None
    try:
        yield panel
    finally:
        if suspends is not None:
            signal.signal(suspends, before)
        panel.end()


@contextmanager
def token_counter(*, wanted: bool | None) -> Iterator[Callable[[str], None]]:
    """Count pieces of text on stderr while an answer goes into a pipe or a file; yields the function that counts one.

    Where stdout is the terminal too, the answer is its own progress and nothing is drawn.
    """
    if wanted is False or not may_move() or sys.stdout.isatty():
        yield lambda _: None
        return
    spinner, pieces = Spinner("dots", "reading the prompt"), 0
    # Without the two flags Live would send what is printed to stdout to stderr.
    with Live(spinner, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False):

        def count(_: str) -> None:
            nonlocal pieces
            pieces += 1
            spinner.update(text=f"{pieces} pieces of text")

        yield count


@contextmanager
def drawn_line(say: Callable[[], str]) -> Iterator[Watch]:
    """Draw a line over itself, four times a second; it is gone at the end."""
    # Without the two flags Live would send what is printed to stdout to stderr.
    with Live(
        console=Console(stderr=True), transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    ) as live:

        def draw(text: str) -> None:
            live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

        yield Lines(draw, say, Every(_DRAWN_EVERY_S, at_once=True))
