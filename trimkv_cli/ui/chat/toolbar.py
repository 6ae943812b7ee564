"""The line at the bottom of a conversation: budget, what is kept of what was seen, how far back, how fast."""

from __future__ import annotations

from dataclasses import dataclass

from rich.cells import cell_len

from trimkv_cli.ui.look import Look
from trimkv_cli.ui.plain import neutralise
from trimkv_cli.units import format_size, format_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What the line says; None = not known yet."""

    model: str
    kept: int
    seen: int
    slots: int
    horizon: int | None = None  # median age, in tokens, of what is kept
    tps: float | None = None
    budget_bytes: int | None = None
    peak_bytes: int = 0
    attached: int = 0  # files that go with the next message
    must_reread: bool = False


def status_line(status: Status, look: Look) -> str:
    """Return the line, its last facts left out where the width does not hold them; never wider than it."""
    facts = list(_facts(status))
    while len(facts) > 1 and cell_len(look.dot.join(facts)) >= look.width:
        facts.pop()
    return look.dot.join(facts)


def _facts(status: Status) -> list[str]:
    facts = [f"kept {status.kept:,}/{status.seen:,}", f"M {status.slots:,}"]
    if status.must_reread:
        facts = ["to be read again"]
    if status.attached:
        facts.append(f"+{status.attached} file{'s' if status.attached > 1 else ''}")
    if status.budget_bytes is not None:
        facts.append(" of ".join(format_sizes(status.peak_bytes, status.budget_bytes)))
    else:
        facts.append(f"{format_size(status.peak_bytes)}, no budget")
    if status.horizon is not None:
        facts.append(f"horizon {status.horizon:,}")
    if status.tps is not None:
        facts.append(f"{status.tps:.1f} tok/s")
    return [*facts, neutralise(status.model)]
