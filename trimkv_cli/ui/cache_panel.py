"""The cache panel: every byte against the budget, and what a cache that forgets nothing would need."""

from __future__ import annotations

from rich.text import Text

from trimkv_cli.events import MemoryUse
from trimkv_cli.ui.look import Look
from trimkv_cli.units import format_size, format_sizes

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
