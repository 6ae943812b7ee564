"""The memory map: which parts of a sequence are still held, by how many heads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.text import Text

from trimkv_cli.retained import Retained
from trimkv_cli.ui.look import Look

BINS = 64
_MARGIN = 6
_ROWS = 4


def memory_map(retained: Retained, look: Look) -> Text:
    """Draw up to 64 bins over positions 0…t; a bin's height is the share of (layer, head) slots that still hold it."""
    return draw_bins(bin_shares(retained.shares(), BINS), retained.seen, look)


def bin_shares(shares: Sequence[float], bins: int) -> list[float]:
    """Average over at most `bins` equal parts of the sequence."""
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
        picture.append(_label(row, rows), "dim")
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


def _label(row: int, rows: int) -> str:
    return {rows: "100% ", rows // 2: " 50% "}.get(row, "     ")


def _axis(seen: int, width: int) -> str:
    last, middle = str(max(0, seen - 1)), str(seen // 2)
    line = list(" " * (5 + width))
    line[5:6] = "0"
    if width >= 24:
        line[5 + width // 2 : 5 + width // 2 + len(middle)] = middle
    line[5 + width - len(last) : 5 + width] = last
    return "".join(line).rstrip()
