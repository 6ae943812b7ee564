"""Watches an engine at work: gathers from it what the live panel shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trimkv_cli.commands.memory import memory_use
from trimkv_cli.ui.live import Panel, Watch, open_watch
from trimkv_cli.ui.panel import Jobs, PanelState, summary_line
from trimkv_cli.ui.plain import print_note

if TYPE_CHECKING:
    from trimkv_cli.engine.engine import Engine


@contextmanager
def watch(
    llm: Engine,
    *,
    live: bool | None,
    quiet: bool,
    ascii_only: bool = False,
    jobs: Callable[[], Jobs] | None = None,
) -> Iterator[Watch]:
    """Show on stderr what an engine does; call the watch's `tick` after every step.

    On a terminal that is a panel, elsewhere (or with `live` False) a line every ten seconds, with `quiet` nothing.
    Where a panel was, one line stays.
    """
    started = time.monotonic()

    def ask() -> PanelState:
        glance = llm.glance()
        return PanelState(
            memory=memory_use(llm, seen=0 if glance is None else glance.seen_tokens),
            run=llm.stats,
            glance=glance,
            evicted=llm.evicted,
            reading=llm.reading,
            elapsed_s=time.monotonic() - started,
            ttft_s=llm.first_token_s,
            jobs=None if jobs is None else jobs(),
        )

    with open_watch(ask, wanted=live, quiet=quiet, ascii_only=ascii_only) as shown:
        yield shown
    if isinstance(shown, Panel):
        print_note(summary_line(ask()))
