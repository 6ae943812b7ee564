"""Which turns of a conversation are remembered: one line each, message and answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from trimkv_cli.retained import Retained
from trimkv_cli.ui.look import Look
from trimkv_cli.ui.plain import neutralise


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
        picture.append(" " + _at_most(words, room, look), look.style(share))
    return picture


def _at_most(words: str, room: int, look: Look) -> str:
    if cell_len(words) <= room:
        return words
    more = "..." if look.ascii else "…"
    return set_cell_size(words, room - cell_len(more)).rstrip() + more
