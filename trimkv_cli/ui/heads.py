"""The strip of layers × heads: how full each head is, or how far back it reaches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.text import Text

from trimkv_cli.retained import Retained, median_age
from trimkv_cli.ui.look import Look

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
    columns = [_at_most(layer, rows) for layer in values]
    heads = "heads" if all(len(layer) <= rows for layer in values) else f"means of {len(values[0])} heads"
    picture = Text().append(look.join([f"{heads} down, {len(values)} layers across", caption]), "dim")
    gap = " " if 2 * len(columns) + 2 <= look.width else ""
    for head in range(max(len(column) for column in columns)):
        picture.append("\n  ")
        for column in columns:
            value = column[head] if head < len(column) else 0.0
            picture.append(look.digit(value) + gap, look.style(value))
    return picture


def _at_most(values: Sequence[float], count: int) -> list[float]:
    rows = min(count, len(values))
    edges = [index * len(values) // rows for index in range(rows + 1)]
    return [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
