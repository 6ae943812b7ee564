"""The live panel: bytes against the budget, what the cache holds, and how fast it goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from rich.cells import cell_len
from rich.text import Text

from trimkv_cli.events import CacheSnapshot, MemoryUse, RunStats
from trimkv_cli.ui.cache_panel import cache_panel, draw_bins, draw_strip
from trimkv_cli.ui.look import Look

_WIDE = 110
_MAP_ROWS = 2
_STRIP_ROWS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Jobs:
    """Where a batch stands; `queued` is None while nobody knows how many are to come."""

    done: int
    failed: int
    running: int
    queued: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PanelState:
    """All that a panel shows, at one moment; `reading` is how many prompt tokens are read, of how many."""

    memory: MemoryUse
    run: RunStats
    snapshot: CacheSnapshot | None
    evicted: int
    reading: tuple[int, int]
    elapsed_s: float
    ttft_s: float | None = None
    jobs: Jobs | None = None

    @property
    def prefill_tps(self) -> float:
        return self.run.prefill_tokens / self.run.prefill_s if self.run.prefill_s else 0.0

    @property
    def decode_tps(self) -> float:
        return self.run.decode_tokens / self.run.decode_s if self.run.decode_s else 0.0

    @property
    def reading_left_s(self) -> float | None:
        """Estimate how long the prompts that have begun still take to read; None when nothing is known."""
        read, whole = self.reading
        return (whole - read) / self.prefill_tps if whole > read and self.prefill_tps else None


def draw_panel(now: PanelState, before: PanelState | None, look: Look) -> list[str]:
    """Return the panel's lines, the most important first; `before` is what was shown last, for rates."""
    return [line for part in _parts(now, before, look) for line in look.paint(part).split("\n")]


def progress_line(now: PanelState) -> str:
    """Say in one plain line how far the work is, for a log."""
    return ", ".join([*_jobs(now), *_reading(now), *_writing(now), f"{now.elapsed_s:.0f} s"])


def summary_line(now: PanelState) -> str:
    """Say in one line what was done, for when the panel is gone."""
    written = f" at {now.decode_tps:,.1f} tok/s" if now.run.decode_s else ""
    return (
        f"{now.run.prefill_tokens:,} tokens read at {now.prefill_tps:,.0f} tok/s, {now.run.decode_tokens:,} written"
        f"{written}, {now.evicted:,} evictions, {now.elapsed_s:.1f} s"
    )


def _parts(now: PanelState, before: PanelState | None, look: Look) -> Iterator[Text]:
    yield cache_panel(now.memory, look)
    if now.snapshot is not None:
        yield _pictures(now.snapshot, look)
    yield Text(look.join([*_jobs(now), *_counts(now, before)]))
    yield Text(look.join([*_reading(now), *_speed(now)]))


def _pictures(snapshot: CacheSnapshot, look: Look) -> Text:
    bins = draw_bins(snapshot.shares, snapshot.seen_tokens, look, rows=_MAP_ROWS)
    if look.width < _WIDE:
        return Text("\n").join([bins, _strip(snapshot, look)])
    strip = _strip(snapshot, Look(width=look.width - 76, ascii=look.ascii, colour=look.colour))
    return _beside(bins, strip, 74)


def _strip(snapshot: CacheSnapshot, look: Look) -> Text:
    if snapshot.kept_per_head < snapshot.slots:
        share = snapshot.kept_per_head / snapshot.slots
        return draw_strip(
            [[share] * len(layer) for layer in snapshot.horizons], "fill of each head", look, rows=_STRIP_ROWS
        )
    longest = max(1, *(max(layer) for layer in snapshot.horizons))
    shares = [[age / longest for age in layer] for layer in snapshot.horizons]
    return draw_strip(shares, f"horizon of each head, 9 = {longest:,} back", look, rows=_STRIP_ROWS)


def _beside(left: Text, right: Text, column: int) -> Text:
    """Put two pictures side by side, the right one from `column` on."""
    pairs = zip_longest(left.split("\n"), right.split("\n"), fillvalue=Text(""))
    lines = [Text.assemble(a, " " * max(1, column - cell_len(a.plain)), b) if b.plain else a for a, b in pairs]
    return Text("\n").join(lines)


def _jobs(now: PanelState) -> list[str]:
    if now.jobs is None:
        return []
    queued = [] if now.jobs.queued is None else [f"{now.jobs.queued:,} queued"]
    return [f"{now.jobs.done:,} done", f"{now.jobs.failed:,} failed", f"{now.jobs.running:,} in flight", *queued]


def _counts(now: PanelState, before: PanelState | None) -> list[str]:
    if now.snapshot is None:
        return ["nothing read yet"]
    rate = 0.0
    if before is not None and now.elapsed_s > before.elapsed_s:
        rate = max(0, now.evicted - before.evicted) / (now.elapsed_s - before.elapsed_s)
    snapshot = now.snapshot
    return [
        f"{snapshot.seen_tokens:,} seen",
        f"{snapshot.kept_per_head:,} of {snapshot.slots:,} kept per head",
        f"{now.evicted:,} evicted",
        f"{rate:,.0f} evictions/s",
    ]


def _speed(now: PanelState) -> list[str]:
    first = [] if now.ttft_s is None else [f"first token after {now.ttft_s:.1f} s"]
    read = [f"prefill {now.prefill_tps:,.0f} tok/s"] if now.run.prefill_s else []
    return [*read, *_writing(now), *first, f"{now.elapsed_s:.0f} s"]


def _writing(now: PanelState) -> list[str]:
    return [f"decode {now.decode_tps:,.1f} tok/s"] if now.run.decode_s else []


def _reading(now: PanelState) -> list[str]:
    read, whole = now.reading
    if whole <= read:
        return []
    left = now.reading_left_s
    about = "" if left is None else f", about {left:.0f} s left"
    return [f"reading {read:,} of {whole:,} tokens ({read / whole:.0%}){about}"]
