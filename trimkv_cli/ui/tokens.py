"""Text coloured by what the cache keeps of it: each token with its share of heads and its expected survival."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from trimkv_cli.events import Retained
from trimkv_cli.ui.look import Look
from trimkv_cli.ui.plain import neutralise

_MOST_RANGES = 6


@dataclass(frozen=True, slots=True)
class _Cell:
    text: str
    share: float
    ends_line: bool


def token_view(
    retained: Retained, pieces: Sequence[str], look: Look, *, start: int = 0, stop: int | None = None
) -> Text:
    """Show the tokens from `start` to `stop` in the colour of the share of heads that keep them, tenths below.

    A digit under a token's first character is the share in tenths, "." means that every head has let it go. `pieces`
    are the texts of all tokens seen, in order.
    """
    shares = retained.shares()
    end = min(retained.seen, len(pieces)) if stop is None else stop
    shown = zip(pieces[start:end], shares[start:end], strict=True)
    cells = (_Cell(_shown(piece, look), share, "\n" in piece) for piece, share in shown)
    picture = Text()
    for number, line in enumerate(_lines(cells, look.width)):
        picture.append("\n" if number else "")
        for cell in line:
            picture.append(cell.text, look.style(cell.share))
        picture.append("\n")
        for cell in line:
            room = max(0, cell_len(cell.text) - 1)
            picture.append(look.digit(cell.share)[: cell_len(cell.text)] + " " * room, look.style(cell.share))
    return picture


def survival_table(retained: Retained, pieces: Sequence[str], look: Look, *, start: int, stop: int) -> Text:
    """List the tokens from `start` to `stop`: the share of heads that keep each, and how much longer any of them does.

    The share is exact, the survival an estimate: what a head's weakest token scores moves with what comes. What is
    pinned for "this prompt" stays until the next one begins.
    """
    shares, survivals, pinned = retained.shares(), retained.survivals(), retained.pinned()
    picture = Text(f"{'position':>8}  {'kept by':>7}  {'for about':>12}  token", "dim")
    for position in range(start, stop):
        share = shares[position]
        held = f"{share:7.0%}" if share else f"{'none':>7}"
        time_left = format_tokens(survivals[position], look) if share else "gone"
        if retained.stays_for_prompt(position) and not pinned.get(position):
            time_left = "this prompt"
        piece = _shown(pieces[position], look)
        picture.append(f"\n{position:>8}  {held}  {time_left:>12}  {piece}", look.style(share))
    return picture


def next_out_line(retained: Retained, pieces: Sequence[str], look: Look, *, most: int = 5) -> str:
    """Say which tokens would be given up first, and in how many heads."""
    candidates = retained.next_out()
    if not candidates:
        return "nothing has to go yet: there are free slots"
    named = [
        f"{_shown(pieces[position], look).strip() or 'space'!r} at {position} ({heads} of {retained.num_heads} heads)"
        for position, heads in candidates[:most]
    ]
    more = len(candidates) - most
    return look.join(["next to go: " + named[0], *named[1:], *([f"{more} others"] if more > 0 else [])])


def pinned_line(retained: Retained, look: Look) -> str | None:
    """Say which positions no score can evict, and until when; None where there are none."""
    pinned, newest = retained.pinned(), max(layer.recent for layer in retained.layers)
    if not pinned:
        return None
    for_good = _ranges([position for position, stays in pinned.items() if stays])
    for_now = [position for position, stays in pinned.items() if not stays and retained.stays_for_prompt(position)]
    parts = [f"{for_good} for good" if for_good else "", f"{_ranges(for_now)} until the next prompt" if for_now else ""]
    parts.append(f"the newest {newest:,}" if newest else "")
    first, *others = filter(None, parts)
    return look.join([f"pinned: {first}", *others])


def _ranges(positions: Sequence[int]) -> str:
    """Write ascending positions as ranges, the first few of them."""
    there = set(positions)
    starts = [position for position in positions if position - 1 not in there]
    ends = [position for position in positions if position + 1 not in there]
    named = [str(first) if first == last else f"{first}-{last}" for first, last in zip(starts, ends, strict=True)]
    return ", ".join([*named[:_MOST_RANGES], *([f"{len(named) - _MOST_RANGES} more"] if named[_MOST_RANGES:] else [])])


def format_tokens(count: float, look: Look) -> str:
    if math.isnan(count):
        return ""
    if math.isinf(count):
        return look.infinity
    rounded = round(count) if count < 100 else int(float(f"{count:.2g}"))
    return f"{rounded:,} tokens" if rounded != 1 else "1 token"


def _shown(piece: str, look: Look) -> str:
    visible = neutralise(piece.replace("\n", "\\n" if look.ascii else "↵").replace("\t", " "))
    return visible.encode("ascii", "backslashreplace").decode() if look.ascii else visible


def _lines(cells: Iterator[_Cell], width: int) -> Iterator[list[_Cell]]:
    line: list[_Cell] = []
    used = 0
    for cell in cells:
        size = cell_len(cell.text)
        if line and used + size > width:
            yield line
            line, used = [], 0
        line.append(cell)
        used += size
        if cell.ends_line:
            yield line
            line, used = [], 0
    if line:
        yield line
