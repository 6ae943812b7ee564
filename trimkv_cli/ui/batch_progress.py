"""What moves on a terminal while a batch job runs: one line on stderr, redrawn a few times a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

_EVERY_S = 0.25


@contextmanager
def drawn_line() -> Iterator[Callable[[Callable[[], str]], None]]:
    """Yield a function that draws what the given one says, when it is time to; the line is gone at the end."""
    due = 0.0
    # Without the two flags Live would send what is printed to stdout to stderr.
    with Live(
        console=Console(stderr=True), transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    ) as live:

        def draw(say: Callable[[], str]) -> None:
            nonlocal due
            if (now := time.monotonic()) >= due:
                due = now + _EVERY_S
                live.update(Text(say(), no_wrap=True, overflow="ellipsis"), refresh=True)

        yield draw
