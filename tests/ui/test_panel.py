"""Mistakes of the live panel: lines that wrap, codes off a terminal, a frame that eats what stood above it."""

from __future__ import annotations

import io
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyte
import pytest
import torch
from rich.cells import cell_len

from trimkv_cli.cache.retention_cache import RetentionCache
from trimkv_cli.engine.snapshot import CacheSnapshots
from trimkv_cli.events import CacheSnapshot, MemoryUse, RunStats, median_age
from trimkv_cli.streams import Every
from trimkv_cli.ui import live
from trimkv_cli.ui.cache_panel import bin_shares
from trimkv_cli.ui.live import Lines, LiveRegion, Panel, open_watch
from trimkv_cli.ui.look import Look
from trimkv_cli.ui.panel import Jobs, PanelState, draw_panel, progress_line

MEMORY = MemoryUse(
    weights_bytes=400 << 20, gate_bytes=10 << 20, kv_bytes=100 << 20, workspace_bytes=90 << 20, peak_bytes=700 << 20,
    budget_bytes=1 << 30, seen_tokens=12345, full_cache_bytes=4 << 30,
)  # fmt: skip
SNAPSHOT = CacheSnapshot(
    seen_tokens=12345, kept_per_head=32, slots=32, shares=tuple(i / 63 for i in range(64)), horizons=((5, 900),) * 4
)
STATS = RunStats(prefill_tokens=1200, decode_tokens=40, shared_prefix_tokens=0, steps=9, prefill_s=0.5, decode_s=2.0)
PROGRESS = PanelState(
    memory=MEMORY, run=STATS, snapshot=SNAPSHOT, evicted=190_000, reading=(12_800, 50_000), elapsed_s=8.0, ttft_s=0.8,
    jobs=Jobs(done=12, failed=1, running=8, queued=20),
)  # fmt: skip


class Terminal(io.StringIO):
    """A stream that a screen of pyte shows; its size is that of the screen."""

    encoding = "utf-8"

    def __init__(self, columns: int, lines: int = 24) -> None:
        super().__init__()
        self.screen = pyte.Screen(columns, lines)
        self.parser = pyte.Stream(self.screen)

    def write(self, text: str) -> int:
        self.parser.feed(text.replace("\n", "\r\n"))
        return super().write(text)

    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]


@pytest.fixture
def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Terminal]:
    def make(columns: int, lines: int = 24) -> Terminal:
        stream = Terminal(columns, lines)
        size = property(lambda _: live.os.terminal_size((stream.screen.columns, stream.screen.lines)))
        monkeypatch.setattr(LiveRegion, "size", size)
        return stream

    return make


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_the_panel_fits_and_says_everything(width: int, ascii_only: bool) -> None:
    """Catches lines that wrap, figures that are missing, colour that says what no character does."""
    before = replace(PROGRESS, evicted=180_000, elapsed_s=6.0)
    look = Look(width=width, ascii=ascii_only)
    lines = draw_panel(PROGRESS, before, look)
    assert all(cell_len(line) <= width for line in lines)
    text = "\n".join(lines)
    for said in (
        "W weights 400.0 MiB", "peak 700.0 MiB", "free", "4.0 GiB for these 12,345 tokens", "horizon of each head",
        "12,345 seen", "32 of 32 kept per head", "190,000 evicted", "5,000 evictions/s", "prefill 2,400 tok/s",
        "decode 20.0 tok/s", "first token after 0.8 s", "reading 12,800 of 50,000 tokens (26%), about 16 s left",
        "12 done", "1 failed", "8 in flight", "20 queued",
    ):  # fmt: skip
        assert said in text
    assert text.isascii() or not ascii_only
    coloured = "\n".join(draw_panel(PROGRESS, before, Look(width=width, ascii=ascii_only, colour=True)))
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == text
    assert len(lines) <= 23


def test_a_large_model_fits_a_low_terminal() -> None:
    """Catches a strip of many heads that pushes speed and counts off the screen."""
    snapshot = replace(SNAPSHOT, horizons=((5, 900, 7, 8, 9, 10, 11, 12),) * 36)
    lines = draw_panel(replace(PROGRESS, snapshot=snapshot), None, Look(width=60))
    assert len(lines) <= 23
    assert any("means of 8 heads" in line for line in lines)


def test_what_is_not_known_yet_is_not_made_up() -> None:
    """Catches divisions by zero, and an estimate before anything was read."""
    stats = RunStats(prefill_tokens=0, decode_tokens=0, shared_prefix_tokens=0, steps=0, prefill_s=0.0, decode_s=0.0)
    start = replace(PROGRESS, run=stats, snapshot=None, reading=(0, 900), ttft_s=None, jobs=None)
    text = "\n".join(draw_panel(start, None, Look(width=80)))
    assert "reading 0 of 900 tokens (0%)" in text
    assert "left" not in text
    assert "nothing read yet" in text
    assert progress_line(start).startswith("reading 0 of 900")
    assert "tok/s" not in text
    assert "decode" not in progress_line(start)


def test_a_panel_is_redrawn_in_place_and_leaves_nothing(terminal_of: Callable[..., Terminal]) -> None:
    """Catches frames that pile up, text above that is eaten, and a panel that stays when all is done."""
    stream = terminal_of(80)
    stream.write("$ trimkv summarize book.txt\n")
    panel = Panel(stream, lambda: PROGRESS, every_s=0.0)
    for _ in range(3):
        panel.tick()
    assert sum("horizon of each head" in line for line in stream.shown) == 1
    with panel.aside():
        stream.write("an answer\n")
    panel.tick()
    assert stream.shown[:2] == ["$ trimkv summarize book.txt", "an answer"]
    panel.end()
    assert stream.shown == ["$ trimkv summarize book.txt", "an answer", *[""] * 22]
    assert "\x1b[?25l" not in stream.getvalue()


def test_a_terminal_that_becomes_narrower_keeps_no_pieces(terminal_of: Callable[..., Terminal]) -> None:
    """Catches the wrapped upper lines of a wide frame that stay above the narrow one."""
    stream = terminal_of(20)
    frame = LiveRegion(stream)
    frame.show(["\x1b[1m" + "x" * 18 + "\x1b[0m", "", "y" * 5])
    stream.screen.resize(lines=24, columns=9)
    frame.show(["z"])
    assert stream.getvalue().endswith("\r\x1b[4A\x1b[Jz\n")


def test_ctrl_z_leaves_a_clean_terminal_and_fg_draws_anew(
    terminal_of: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a shell's prompt inside of the panel, and a panel that erases what the shell has written."""
    stream = terminal_of(80, 40)
    panel, handlers, seen = Panel(stream, lambda: PROGRESS, every_s=3600.0), [], []

    def stop(_: int, number: int) -> None:
        assert handlers == [(number, signal.SIG_DFL)]
        seen.append([line for line in stream.shown if line])
        stream.write("[1]+ Stopped\n$ fg\n")

    monkeypatch.setattr(live.signal, "signal", lambda number, handler: handlers.append((number, handler)))
    monkeypatch.setattr(live.os, "kill", stop)
    panel.tick()
    panel.stop_and_go_on(signal.SIGTSTP, None)
    assert seen == [[]]
    assert handlers[-1] == (signal.SIGTSTP, panel.stop_and_go_on)
    panel.tick()
    assert stream.shown[:2] == ["[1]+ Stopped", "$ fg"]
    assert sum("horizon of each head" in line for line in stream.shown) == 1


def test_a_low_terminal_keeps_what_stands_above(terminal_of: Callable[..., Terminal]) -> None:
    """Catches a frame higher than the terminal, which the cursor cannot go back over."""
    stream = terminal_of(80, 6)
    panel = Panel(stream, lambda: PROGRESS, every_s=0.0)
    for _ in range(3):
        panel.tick()
    assert sum("weights" in line for line in stream.shown) == 1
    panel.end()
    assert stream.shown == [""] * 6


def test_the_panel_asks_only_when_something_is_due(terminal_of: Callable[..., Terminal]) -> None:
    """Catches figures gathered at every step."""
    asked: list[int] = []

    def ask() -> PanelState:
        asked.append(1)
        return PROGRESS

    panel, lines = (
        Panel(terminal_of(80), ask, every_s=3600.0),
        Lines(print, lambda: progress_line(ask()), Every(3600.0)),
    )
    for _ in range(100):
        panel.tick()
        lines.tick()
    assert len(asked) == 1


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"CI": "1"}, {}])
def test_off_a_terminal_there_is_no_code_whatever_the_environment_says(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches cursor codes in a log under FORCE_COLOR."""
    stream: Any = io.StringIO() if not environment else Terminal(80)
    monkeypatch.setattr(live.sys, "stderr", stream)
    for name, value in {"FORCE_COLOR": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    with open_watch(lambda: PROGRESS, wanted=True, quiet=False) as watch:
        assert isinstance(watch, Lines)
        watch._every.hurry()
        watch.tick()
    assert stream.getvalue() == progress_line(PROGRESS) + "\n"
    with open_watch(lambda: PROGRESS, wanted=None, quiet=True) as watch:
        watch.tick()
    assert stream.getvalue() == progress_line(PROGRESS) + "\n"


def test_a_snapshot_tells_what_the_cache_holds() -> None:
    """Catches shares and horizons that differ from the full count, at sizes that are looked at whole."""
    cache = RetentionCache(
        rows=2, kv_budget=24, num_kv_heads=2, head_dim=4, windows=[None, 16], dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    snapshots = CacheSnapshots(cache)
    assert snapshots.take(1) is None
    cache.seen[1] = 300
    generator = torch.Generator().manual_seed(1)
    for layer in cache.layers:
        for head in range(2):
            chosen = torch.randperm(300, generator=generator)[: layer.size].int()
            layer.slots.position[1, head] = chosen
            layer.slots.log_beta[1, head] = -0.5
    snapshot = snapshots.take(1)
    assert snapshot is not None
    retained = cache.retained(1)
    assert list(snapshot.shares) == pytest.approx(bin_shares(retained.shares(), 64), abs=1e-6)
    expected = [[median_age(300, head) for head in layer.heads] for layer in retained.layers]
    for found, wanted in zip(snapshot.horizons, expected, strict=True):
        assert found == pytest.approx(wanted, abs=40)
    assert (snapshot.seen_tokens, snapshot.kept_per_head, snapshot.slots) == (300, 24, 24)


def test_a_terminal_without_a_size_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a division by the width of a terminal that says 0 × 0, as those of containers do."""

    class Sizeless(io.StringIO):
        def fileno(self) -> int:
            return 1

    monkeypatch.setattr(live.os, "get_terminal_size", lambda _: live.os.terminal_size((0, 0)))
    frame = LiveRegion(Sizeless())
    assert frame.size == (80, 24)
    frame.show(["a", "b"])
    frame.clear()
