"""Pictures of a cache: its map over the sequence, its layers, heads and turns, and its parts in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from trimkv_cli.events import MemoryUse, Retained, median_age
from trimkv_cli.ui.look import Look
from trimkv_cli.ui.plain import neutralise
from trimkv_cli.units import format_size, format_sizes

BINS = 64
_MARGIN = 6
_ROWS = 4


def memory_map(retained: Retained, look: Look) -> Text:
    """Draw up to 64 bins over positions 0…t; a bin's height is the share of (layer, head) slots that still hold it."""
    return draw_bins(bin_shares(retained.shares(), BINS), retained.seen, look)


def bin_shares(shares: Sequence[float], bins: int) -> list[float]:
    """Average over at most `bins` equal parts."""
    count = min(bins, len(shares))
    edges = [index * len(shares) // count for index in range(count + 1)] if count else [0]
    return [sum(shares[start:end]) / (end - start) for start, end in pairwise(edges)]


def draw_bins(shares: Sequence[float], seen: int, look: Look, *, rows: int = _ROWS) -> Text:
    """Draw bars `rows` lines high over an axis of positions; bins that do not fit the width are averaged."""
    room = max(8, min(BINS, look.width - _MARGIN))
    heights = bin_shares(shares, room)
    stretch = max(1, room // max(1, len(heights)))
    picture = Text()
    for row in range(rows, 0, -1):
        picture.append({rows: "100% ", rows // 2: " 50% "}.get(row, "     "), "dim")
        for height in heights:
            part = min(1.0, max(0.0, height * rows - (row - 1)))
            picture.append(look.bar(part) * stretch, look.style(height))
        picture.append("\n")
    width = len(heights) * stretch
    corner = "    +" if look.ascii else "    └"
    picture.append(f"{corner}{look.rule * width}\n{_axis(seen, width)}", "dim")
    return picture


def layer_map(retained: Retained, look: Look) -> Text:
    """Draw one line per layer: in which parts of the sequence its heads hold how much, in tenths."""
    room = max(8, min(BINS, look.width - 10))
    picture = Text()
    for index, layer in enumerate(retained.layers):
        alone = Retained(seen=retained.seen, layers=(layer,))
        picture.append(f"{'' if index == 0 else chr(10)}layer {index:3} ", "dim")
        for share in bin_shares(alone.shares(), room):
            picture.append(look.digit(share), look.style(share))
    return picture


def _axis(seen: int, width: int) -> str:
    last, middle = str(max(0, seen - 1)), str(seen // 2)
    line = list(" " * (5 + width))
    line[5:6] = "0"
    if width >= 24:
        line[5 + width // 2 : 5 + width // 2 + len(middle)] = middle
    line[5 + width - len(last) : 5 + width] = last
    return "".join(line).rstrip()


_MOST_ROWS = 8


def head_strip(retained: Retained, look: Look) -> Text:
    """Draw layers as columns and heads as rows: fill while there are free slots, then the horizon.

    The horizon is the median age of what a head keeps, as a share of what was seen.
    """
    if not retained.full:
        values = [[len(head.positions) / layer.slots for head in layer.heads] for layer in retained.layers]
        return draw_strip(values, "fill of each head", look)
    horizons = [[median_age(retained.seen, head) for head in layer.heads] for layer in retained.layers]
    longest = max(max(row) for row in horizons)
    shares = [[horizon / max(1, longest) for horizon in row] for row in horizons]
    return draw_strip(shares, f"horizon of each head, 9 = {longest:,} tokens back", look)


def draw_strip(values: Sequence[Sequence[float]], caption: str, look: Look, *, rows: int = _MOST_ROWS) -> Text:
    """Draw `[layer][head]` values between 0 and 1 in tenths; more heads than `rows` share lines by their mean."""
    columns = [bin_shares(layer, rows) for layer in values]
    heads = "heads" if all(len(layer) <= rows for layer in values) else f"means of {len(values[0])} heads"
    picture = Text().append(look.join([f"{heads} down, {len(values)} layers across", caption]), "dim")
    gap = " " if 2 * len(columns) + 2 <= look.width else ""
    for head in range(max(len(column) for column in columns)):
        picture.append("\n  ")
        for column in columns:
            value = column[head] if head < len(column) else 0.0
            picture.append(look.digit(value) + gap, look.style(value))
    return picture


@dataclass(frozen=True, slots=True)
class Span:
    """The positions from `start` up to `stop`, who said what stands there, and its beginning."""

    speaker: str
    text: str
    start: int
    stop: int


def turn_map(retained: Retained, spans: Sequence[Span], look: Look) -> Text:
    """Draw a line per span: the share of (layer, head) slots that still hold its tokens, and how it begins."""
    shares = retained.shares()
    picture = Text("the share of (layer, head) slots that hold each message", "dim")
    for span in spans:
        held = shares[span.start : span.stop]
        share = sum(held) / len(held) if held else 0.0
        line = f"\n{span.speaker:>9} {share:4.0%} "
        picture.append(line + look.bar(share), look.style(share))
        room = max(8, look.width - len(line) - 2)
        words = neutralise(" ".join(span.text.split()))
        picture.append(" " + _shortened(words, room, look), look.style(share))
    return picture


def _shortened(words: str, room: int, look: Look) -> str:
    if cell_len(words) <= room:
        return words
    more = "..." if look.ascii else "…"
    return set_cell_size(words, room - cell_len(more)).rstrip() + more


_PARTS = (("W", "weights", 61), ("G", "gates", 97), ("K", "KV cache", 172), ("w", "workspace", 73))


def cache_panel(memory: MemoryUse, look: Look) -> Text:
    """Draw the parts as a bar of letters within the budget (or the peak, without one), each named with its bytes."""
    sizes = (memory.weights_bytes, memory.gate_bytes, memory.kv_bytes, memory.workspace_bytes)
    whole = max(memory.budget_bytes or memory.peak_bytes, sum(sizes), 1)
    room = max(8, min(64, look.width - 4))
    picture = Text("[")
    drawn = 0
    for (letter, _, code), size in zip(_PARTS, sizes, strict=True):
        cells = min(room - drawn, max(1, round(size * room / whole))) if size else 0
        picture.append(letter * cells, f"color({code})")
        drawn += cells
    picture.append("." * (room - drawn), "dim")
    picture.append("]\n" + _named(sizes, look) + "\n" + _totals(memory, look))
    return picture


def _named(sizes: tuple[int, ...], look: Look) -> str:
    named = zip(_PARTS, sizes, strict=True)
    return look.join(f"{letter} {name} {format_size(size)}" for (letter, name, _), size in named)


def _totals(memory: MemoryUse, look: Look) -> str:
    facts = [f"peak {format_size(memory.peak_bytes)}"]
    if memory.budget_bytes is not None:
        left = memory.budget_bytes - memory.peak_bytes
        peak, budget = format_sizes(memory.peak_bytes, memory.budget_bytes)
        facts = [f"peak {peak}", f"budget {budget}"]
        facts += [f"free {format_size(left)}" if left >= 0 else f"over by {format_size(-left)}"]
    needed = format_size(memory.full_cache_bytes)
    return look.join([*facts, f"a full cache would need {needed} for these {memory.seen_tokens:,} tokens"])
