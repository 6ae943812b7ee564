"""Everything that there is to see about a cache, one picture under the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from trimkv_cli.events import MemoryUse
from trimkv_cli.retained import Retained
from trimkv_cli.ui.cache_panel import cache_panel
from trimkv_cli.ui.heads import head_strip
from trimkv_cli.ui.look import Look
from trimkv_cli.ui.memory_map import layer_map, memory_map
from trimkv_cli.ui.tokens import next_out_line, token_view

_SHOWN_AT_EACH_END = 300


def inspection(retained: Retained, pieces: Sequence[str], memory: MemoryUse, look: Look) -> str:
    """Return the whole report for a terminal or a pipe."""
    return "\n\n".join(look.paint(part) for part in _parts(retained, pieces, memory, look))


def headline(retained: Retained, look: Look) -> str:
    """Say how much is still held."""
    slots = max(layer.slots for layer in retained.layers)
    kept = sum(len(head.positions) for _, head in retained.heads)
    share = kept / max(1, retained.seen * retained.num_heads)
    gone = sum(held == 0 for held in retained.shares())
    return look.join(
        [
            f"{retained.seen:,} tokens seen",
            f"{slots:,} slots in each of {retained.num_heads} heads",
            f"{share:.1%} is held",
            f"{gone:,} tokens are in no head",
        ]
    )


def _parts(retained: Retained, pieces: Sequence[str], memory: MemoryUse, look: Look) -> Iterator[Text]:
    yield Text(headline(retained, look), "bold")
    yield memory_map(retained, look)
    yield layer_map(retained, look)
    yield head_strip(retained, look)
    yield Text("digits: tenths of the heads that keep a token; . = none", "dim")
    yield from _text(retained, pieces, look)
    yield Text(next_out_line(retained, pieces, look))
    yield cache_panel(memory, look)


def _text(retained: Retained, pieces: Sequence[str], look: Look) -> Iterator[Text]:
    """Show the whole text, or where it is long its two ends, and say what is left out."""
    seen, end = retained.seen, _SHOWN_AT_EACH_END
    if seen <= 2 * end:
        yield token_view(retained, pieces, look)
        return
    yield token_view(retained, pieces, look, stop=end)
    yield Text(f"({seen - 2 * end:,} tokens in between are not shown here; --html FILE shows all)", "dim")
    yield token_view(retained, pieces, look, start=seen - end)
