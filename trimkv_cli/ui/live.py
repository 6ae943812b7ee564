"""What moves while a model works: only on a terminal, never where the answer itself is shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner


def may_move() -> bool:
    """Say whether stderr is a terminal that may be redrawn."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and "CI" not in os.environ


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
